"""The order of an epoch in plain Python, as docs/order.md says, for tests of the real one."""

MASK = (1 << 64) - 1


def keys_of(seed: int, epoch: int) -> list[int]:
    """Derive the eight keys."""

    def mix(x: int) -> int:
        x &= MASK
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    state = mix(seed + golden) ^ mix(epoch + 2 * golden)
    return [mix(state + (i + 1) * golden) >> 32 for i in range(8)]


def reference(seed: int, epoch: int, n: int, position: int) -> int:
    """Compute the row at one position."""

    def fmix(h: int) -> int:
        h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ h >> 16

    keys, bits = keys_of(seed, epoch), max(10, (n - 1).bit_length())
    high_bits, low_bits = bits // 2, bits - bits // 2
    x = position
    while True:
        low, high = x % (1 << low_bits), x >> low_bits
        for k in range(0, 8, 2):
            high ^= fmix((low + keys[k]) & 0xFFFFFFFF) % (1 << high_bits)
            low ^= fmix((high + keys[k + 1]) & 0xFFFFFFFF) % (1 << low_bits)
        x = high << low_bits | low
        if x < n:
            return x


def windowed(extents: list[tuple[int, int]], size_bytes: list[int], window_bytes: int, batch: int, **place: int) -> list[list[int]]:
    """Give the batches of a rank of an epoch that streams; extents: first row and rows of each. place: seed, epoch, rank, world."""
    seed, epoch, rank, world = (place[name] for name in ("seed", "epoch", "rank", "world"))
    sequence = [reference(seed, epoch, len(extents), k) for k in range(len(extents))]
    rows = [(k, extents[e][0] + i) for k, e in enumerate(sequence) for i in range(extents[e][1])]
    steps = -(-len(rows) // (batch * world))
    start, last = rank * len(rows) // world, (rank + 1) * len(rows) // world
    first, second = keys_of(seed, epoch)[:2]
    batches: list[list[int]] = []
    while len(batches) < steps:
        taken, first_place = 0, rows[start][0]
        place_after = first_place
        while place_after < len(sequence) and (taken + size_bytes[sequence[place_after]] <= window_bytes or place_after == first_place):
            taken, place_after = taken + size_bytes[sequence[place_after]], place_after + 1
        stop = next((i for i, (k, _) in enumerate(rows) if k == place_after), len(rows))
        stop = last if stop >= last else start + (stop - start) // batch * batch
        count = steps - len(batches) if stop == last else (stop - start) // batch
        n = stop - start
        assert count > 0, "no window is smaller than a batch here"
        numbers = [reference(first << 32 | second, start, n, i % n) for i in range(count * batch)]
        drawn = [rows[start + number][1] for number in numbers]
        batches += [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
        start = stop
    return batches
