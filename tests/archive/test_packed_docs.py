"""docs/packed-format.md shows a file that is there, and names what is in the code."""

import ast
import re
from pathlib import Path

from archive.packed_reader import Shard
from archives.write_packed import example

PAGE = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text()
EXAMPLE = Path(__file__).parents[1] / "archives" / "packed" / "example.scdp"


def blocks(language: str) -> list[str]:
    """Give the code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_is_as_shown() -> None:
    """The bytes that the page shows, at the places it gives, and zeros elsewhere, are the file."""
    shown = bytearray(EXAMPLE.stat().st_size)
    for line in blocks("hex")[0].splitlines():
        shown[int(line[:4], 16) : int(line[:4], 16) + 16] = bytes.fromhex(line[6:])

    assert bytes(shown) == EXAMPLE.read_bytes()


def test_the_example_holds_what_is_said() -> None:
    """The rows and the order that the page lists are those that the file was made of."""
    said: dict[str, object] = {}
    exec(blocks("python")[0], said)

    case = example()

    assert said["order"] == case.orders[0]
    assert [{float(c): v for c, v in row.items()} for row in said["rows"]] == [
        dict(zip(map(float, c), v, strict=True)) for c, v in case.rows
    ]


def test_the_walk_through_a_row_is_its_bytes() -> None:
    """The bytes that the page explains one by one are those of row 0."""
    shown = bytes.fromhex("".join(re.findall(r"^((?:[0-9a-f]{2} )+) ", blocks("text")[-1], re.MULTILINE)))

    assert EXAMPLE.read_bytes()[4096 : 4096 + len(shown)] == shown
    assert len(shown) == 16


def test_the_rule_of_checks_gives_the_checks() -> None:
    """The arithmetic that the page writes down, carried out as it stands, gives the checks of the example."""
    shard = Shard(EXAMPLE.read_bytes())
    shard.check_tables()
    rule = next(block for block in blocks("text") if block.startswith("check = "))
    code = rule.replace("second field of the entry", "second").replace("0 .. k - 1", "range(k)").replace(" xor ", " ^ ")
    code = code.replace("(2 * i + 1) * 0x9E3779B1", "(2 * i + 1) * 0x9E3779B1 % 2**32")
    payload = shard.data[shard.payload_at[0] : sum(shard.payload_at[:2])]

    for entry, after in zip(shard.entries[:-1], shard.entries[1:], strict=True):
        words = [int.from_bytes(payload[4 * k : 4 * k + 4], "little") for k in range(entry[0], after[0])]
        names = {"second": entry[1], "w": words, "k": len(words)}
        exec(compile(ast.parse(code), "packed-format.md", "exec"), names)
        assert names["check"] % 2**32 == entry[3]


def test_the_page_gives_the_widths_of_the_code() -> None:
    """The table of codes is what kernels work with."""
    from scdl_gpu.kernels import packed

    cells = {
        line.split(" |")[0][2:]: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in PAGE.splitlines()
        if line.startswith("| bits of a")
    }

    assert (*range(12), *map(int, cells["bits of a gap"][1:])) == packed.GAP_BITS
    assert (*range(12), *map(int, cells["bits of a value"][1:4])) == packed.VALUE_BITS
