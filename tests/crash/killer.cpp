// What a process does to a directory, one call at a time, and how to die before any of them.
//
// Preloaded (LD_PRELOAD) into a process that forks one child per experiment. A child arms a directory and a call number; every call below that directory that
// changes files is counted and logged, and the numbered one is preceded by death, by a stop, or by an error. Counter and log lie in memory shared with forked
// processes, so that the parent reads them after the child's death. Knows libc calls, not stores into mapped memory: of those it sees mmap and msync only.
// fsync is counted but never carried out: the page cache outlives SIGKILL, so that only the order of the calls matters, and the order is in the log.
// That nothing escapes was seen once with strace: five operations, 74 to 151 calls each, kind by kind the same numbers.

#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

enum Mode { COUNT = 0, KILL = 1, STOP = 2, FAIL_ONCE = 3, FULL = 4, SHORT = 5 };

constexpr long ENTRIES = 20000;
constexpr size_t ENTRY_BYTES = 512;

struct Shared {
    std::atomic<long> count;
    std::atomic<int> armed;
    std::atomic<int> shortened;
    long target;
    int mode;
    int error;
    char refused[64];
    int refused_error;
    char directory[PATH_MAX];
    char log[ENTRIES][ENTRY_BYTES];
};

Shared *shared = nullptr;

__attribute__((constructor)) void allocate() {
    void *memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) shared = static_cast<Shared *>(memory);
}

bool armed() { return shared != nullptr && shared->armed.load(std::memory_order_acquire) != 0; }

// Absolute path of `path` as a call relative to `dirfd` sees it: its parent resolved, its last name not (it may not exist yet).
bool resolve(int dirfd, const char *path, char *out) {
    char joined[PATH_MAX];
    if (path == nullptr) return false;
    if (path[0] == '/' || dirfd == AT_FDCWD) {
        if (std::snprintf(joined, sizeof joined, "%s", path) >= PATH_MAX) return false;
    } else {
        char link[64], base[PATH_MAX];
        std::snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return false;
        base[n] = 0;
        if (std::snprintf(joined, sizeof joined, "%.*s/%s", 3000, base, path) >= PATH_MAX) return false;
    }
    size_t length = std::strlen(joined);
    while (length > 1 && joined[length - 1] == '/') joined[--length] = 0;
    char *slash = std::strrchr(joined, '/');
    const char *name = slash == nullptr ? joined : slash + 1;
    char parent[PATH_MAX];
    if (slash == nullptr) {
        if (realpath(".", parent) == nullptr) return false;
    } else {
        char before[PATH_MAX];
        std::snprintf(before, sizeof before, "%.*s", slash == joined ? 1 : static_cast<int>(slash - joined), joined);
        if (realpath(before, parent) == nullptr) return false;
    }
    return std::snprintf(out, PATH_MAX, "%.3000s/%.1000s", parent, name) < PATH_MAX;
}

bool resolve_fd(int fd, char *out) {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0 || !(S_ISREG(status.st_mode) || S_ISDIR(status.st_mode))) return false;
    char link[64];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return false;
    out[n] = 0;
    return true;
}

// The part of `path` below the watched directory ("." for the directory itself), or null.
const char *below(const char *path) {
    size_t length = std::strlen(shared->directory);
    if (std::strncmp(path, shared->directory, length) != 0) return nullptr;
    if (path[length] == 0) return ".";
    return path[length] == '/' ? path + length + 1 : nullptr;
}

struct Verdict {
    int error = 0;        // errno to fail with, 0 to go on
    bool cut = false;     // write only half
};

Verdict judge_paths(const char *op, bool takes_space, const char *first, const char *second) {
    Verdict verdict;
    const char *a = first == nullptr ? nullptr : below(first);
    const char *b = second == nullptr ? nullptr : below(second);
    if (a == nullptr && b == nullptr) return verdict;
    if (std::strcmp(shared->refused, op) == 0) {
        verdict.error = shared->refused_error;
        return verdict;
    }
    long n = shared->count.fetch_add(1) + 1;
    if (n <= ENTRIES) std::snprintf(shared->log[n - 1], ENTRY_BYTES, "%s\t%s\t%s", op, a != nullptr ? a : "-", b != nullptr ? b : "");
    switch (shared->mode) {
    case KILL:
        if (n == shared->target) {
            kill(0, SIGKILL);  // the whole group: worker processes die with it
            for (;;) pause();
        }
        break;
    case STOP:
        if (n == shared->target) raise(SIGSTOP);
        break;
    case FAIL_ONCE:
        if (n == shared->target) verdict.error = shared->error;
        break;
    case FULL:
        if (n >= shared->target && takes_space) {
            if (shared->shortened.exchange(1) == 0) verdict.cut = true;  // a disk takes what still fits, then refuses
            else verdict.error = shared->error;
        }
        break;
    case SHORT:
        verdict.cut = takes_space;
        break;
    default:
        break;
    }
    return verdict;
}

// What cannot be done by half is refused by a disk that has room for half.
Verdict whole(Verdict verdict) {
    if (verdict.cut && shared->mode == FULL) verdict.error = shared->error;
    verdict.cut = false;
    return verdict;
}

Verdict judge_fd(const char *op, bool takes_space, int fd) {
    if (!armed()) return {};
    int saved = errno;
    char path[PATH_MAX];
    Verdict verdict;
    if (resolve_fd(fd, path)) verdict = judge_paths(op, takes_space, path, nullptr);
    errno = saved;
    return verdict;
}

Verdict judge_at(const char *op, bool takes_space, int dirfd, const char *path, int other_dirfd = AT_FDCWD, const char *other = nullptr) {
    if (!armed()) return {};
    int saved = errno;
    char first[PATH_MAX], second[PATH_MAX];
    bool has_first = resolve(dirfd, path, first);
    bool has_second = other != nullptr && resolve(other_dirfd, other, second);
    Verdict verdict = whole(judge_paths(op, takes_space, has_first ? first : nullptr, has_second ? second : nullptr));
    errno = saved;
    return verdict;
}

size_t cut_to(const Verdict &verdict, size_t size) { return verdict.cut && size > 1 ? size / 2 : size; }

}  // namespace

extern "C" {
int killer_arm(const char *directory, long target, int mode, int error) {
    if (shared == nullptr || realpath(directory, shared->directory) == nullptr) return -1;
    shared->count = 0;
    shared->shortened = 0;
    shared->target = target;
    shared->mode = mode;
    shared->error = error;
    shared->armed.store(1, std::memory_order_release);
    return 0;
}
void killer_disarm() { shared->armed.store(0, std::memory_order_release); }
void killer_refuse(const char *op, int error) {
    std::snprintf(shared->refused, sizeof shared->refused, "%s", op);
    shared->refused_error = error;
}
long killer_count() { return shared->count.load(); }
const char *killer_log(long i) { return i >= 0 && i < ENTRIES ? shared->log[i] : ""; }
}

// One interposed function: declared under its libc name by asm label, so that glibc's own declaration (attributes, noexcept) does not clash.
#define INTERPOSE(result, name, parameters)                                                                                                                    \
    extern "C" __attribute__((visibility("default"))) result my_##name parameters asm(#name);                                                                  \
    static result(*real_##name()) parameters {                                                                                                                 \
        static auto found = reinterpret_cast<result(*) parameters>(dlsym(RTLD_NEXT, #name));                                                                   \
        return found;                                                                                                                                          \
    }                                                                                                                                                          \
    extern "C" result my_##name parameters

#define REFUSE(verdict)                                                                                                                                        \
    do {                                                                                                                                                       \
        if ((verdict).error != 0) {                                                                                                                            \
            errno = (verdict).error;                                                                                                                           \
            return -1;                                                                                                                                         \
        }                                                                                                                                                      \
    } while (0)

// ---- bytes

#define BYTES(name, parameters, op, fd, size, call)                                                                                                            \
    INTERPOSE(ssize_t, name, parameters) {                                                                                                                     \
        Verdict verdict = judge_fd(op, true, fd);                                                                                                              \
        if (size < 2) verdict = whole(verdict);                                                                                                                \
        REFUSE(verdict);                                                                                                                                       \
        size = cut_to(verdict, size);                                                                                                                          \
        return real_##name() call;                                                                                                                             \
    }

BYTES(write, (int fd, const void *buffer, size_t size), "write", fd, size, (fd, buffer, size))
BYTES(pwrite, (int fd, const void *buffer, size_t size, off_t at), "write", fd, size, (fd, buffer, size, at))
BYTES(pwrite64, (int fd, const void *buffer, size_t size, off64_t at), "write", fd, size, (fd, buffer, size, at))
BYTES(sendfile, (int fd, int from, off_t *at, size_t size), "write", fd, size, (fd, from, at, size))
BYTES(sendfile64, (int fd, int from, off64_t *at, size_t size), "write", fd, size, (fd, from, at, size))
BYTES(copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags), "write", fd, size, (from, at, fd, to, size, flags))

// Vectors are cut to their first element, if they have two or more: a legal short write.
#define VECTORS(name, parameters, call)                                                                                                                        \
    INTERPOSE(ssize_t, name, parameters) {                                                                                                                     \
        Verdict verdict = judge_fd("write", true, fd);                                                                                                         \
        REFUSE(verdict);                                                                                                                                       \
        if (verdict.cut && n > 1) n = 1;                                                                                                                       \
        return real_##name() call;                                                                                                                             \
    }

VECTORS(writev, (int fd, const struct iovec *vectors, int n), (fd, vectors, n))
VECTORS(pwritev, (int fd, const struct iovec *vectors, int n, off_t at), (fd, vectors, n, at))
VECTORS(pwritev64, (int fd, const struct iovec *vectors, int n, off64_t at), (fd, vectors, n, at))
VECTORS(pwritev2, (int fd, const struct iovec *vectors, int n, off_t at, int flags), (fd, vectors, n, at, flags))

// stdio calls write inside libc, where nothing can stand between: its own calls are counted instead.
INTERPOSE(size_t, fwrite, (const void *buffer, size_t size, size_t n, FILE *file)) {
    Verdict verdict = armed() ? whole(judge_fd("fwrite", true, fileno(file))) : Verdict{};
    if (verdict.error != 0) {
        errno = verdict.error;
        return 0;
    }
    return real_fwrite()(buffer, size, n, file);
}

INTERPOSE(int, fflush, (FILE *file)) {
    if (file != nullptr && armed()) REFUSE(whole(judge_fd("fflush", true, fileno(file))));
    return real_fflush()(file);
}

INTERPOSE(int, fclose, (FILE *file)) {
    Verdict verdict = file != nullptr && armed() ? whole(judge_fd("fclose", true, fileno(file))) : Verdict{};
    int result = real_fclose()(file);
    REFUSE(verdict);
    return result;
}

#define MAP(name, type)                                                                                                                                        \
    INTERPOSE(void *, name, (void *address, size_t size, int protection, int flags, int fd, type at)) {                                                        \
        bool writes = fd >= 0 && (protection & PROT_WRITE) != 0 && (flags & MAP_TYPE) != MAP_PRIVATE;                                                          \
        Verdict verdict = writes ? judge_fd("mmap", false, fd) : Verdict{};                                                                                    \
        if (verdict.error == 0) return real_##name()(address, size, protection, flags, fd, at);                                                                \
        errno = verdict.error;                                                                                                                                 \
        return MAP_FAILED;                                                                                                                                     \
    }

MAP(mmap, off_t)
MAP(mmap64, off64_t)


// msync knows an address only: counted as a call on the watched directory itself.
INTERPOSE(int, msync, (void *address, size_t size, int flags)) {
    if (armed()) {
        REFUSE(judge_paths("msync", false, shared->directory, nullptr));
        return 0;
    }
    return real_msync()(address, size, flags);
}

// ---- durability

#define SYNC(name, op, parameters)                                                                                                                             \
    extern "C" __attribute__((visibility("default"))) int my_##name parameters asm(#name);                                                                     \
    extern "C" int my_##name parameters {                                                                                                                      \
        REFUSE(judge_fd(op, false, fd));                                                                                                                       \
        return 0;                                                                                                                                              \
    }

SYNC(fsync, "fsync", (int fd))
SYNC(fdatasync, "fsync", (int fd))
SYNC(syncfs, "syncfs", (int fd))
SYNC(sync_file_range, "writeback", (int fd, off64_t, off64_t, unsigned))

// ---- sizes

// ftruncate, rename and the like: refused, or done as they are.
#define PLAIN(name, parameters, judgement, call)                                                                                                               \
    INTERPOSE(int, name, parameters) {                                                                                                                         \
        REFUSE(judgement);                                                                                                                                     \
        return real_##name() call;                                                                                                                             \
    }

PLAIN(ftruncate, (int fd, off_t size), judge_fd("ftruncate", false, fd), (fd, size))
PLAIN(ftruncate64, (int fd, off64_t size), judge_fd("ftruncate", false, fd), (fd, size))
PLAIN(truncate, (const char *path, off_t size), judge_at("truncate", false, AT_FDCWD, path), (path, size))
PLAIN(truncate64, (const char *path, off64_t size), judge_at("truncate", false, AT_FDCWD, path), (path, size))

// posix_fallocate returns its error; fallocate sets errno. Neither takes a part.
#define ALLOCATE(name, parameters, call, refusal)                                                                                                              \
    INTERPOSE(int, name, parameters) {                                                                                                                         \
        Verdict verdict = whole(judge_fd("fallocate", true, fd));                                                                                              \
        if (verdict.error != 0) return refusal;                                                                                                                \
        return real_##name() call;                                                                                                                             \
    }

ALLOCATE(posix_fallocate, (int fd, off_t at, off_t size), (fd, at, size), verdict.error)
ALLOCATE(posix_fallocate64, (int fd, off64_t at, off64_t size), (fd, at, size), verdict.error)
ALLOCATE(fallocate, (int fd, int how, off_t at, off_t size), (fd, how, at, size), (errno = verdict.error, -1))
ALLOCATE(fallocate64, (int fd, int how, off64_t at, off64_t size), (fd, how, at, size), (errno = verdict.error, -1))

// ---- names

static bool exists(int fd, const char *path) {
    struct stat status;
    int saved = errno;
    bool found = fstatat(fd, path, &status, 0) == 0;
    errno = saved;
    return found;
}

// A mkdir of what is there already changes nothing.
static Verdict judge_mkdir(int fd, const char *path) {
    if (!armed() || exists(fd, path)) return {};
    return judge_at("mkdir", true, fd, path);
}

PLAIN(unlink, (const char *path), judge_at("unlink", false, AT_FDCWD, path), (path))
PLAIN(unlinkat, (int fd, const char *path, int flags), judge_at((flags & AT_REMOVEDIR) != 0 ? "rmdir" : "unlink", false, fd, path), (fd, path, flags))
PLAIN(rmdir, (const char *path), judge_at("rmdir", false, AT_FDCWD, path), (path))
PLAIN(remove, (const char *path), judge_at("unlink", false, AT_FDCWD, path), (path))
PLAIN(mkdir, (const char *path, mode_t mode), judge_mkdir(AT_FDCWD, path), (path, mode))
PLAIN(mkdirat, (int fd, const char *path, mode_t mode), judge_mkdir(fd, path), (fd, path, mode))
PLAIN(symlink, (const char *text, const char *path), judge_at("symlink", true, AT_FDCWD, path), (text, path))
PLAIN(symlinkat, (const char *text, int fd, const char *path), judge_at("symlink", true, fd, path), (text, fd, path))
PLAIN(link, (const char *from, const char *to), judge_at("link", true, AT_FDCWD, from, AT_FDCWD, to), (from, to))
PLAIN(linkat, (int fd, const char *from, int other, const char *to, int flags), judge_at("link", true, fd, from, other, to), (fd, from, other, to, flags))
PLAIN(rename, (const char *from, const char *to), judge_at("rename", false, AT_FDCWD, from, AT_FDCWD, to), (from, to))
PLAIN(renameat, (int fd, const char *from, int other, const char *to), judge_at("rename", false, fd, from, other, to), (fd, from, other, to))

static const char *rename_op(unsigned flags) {
    return (flags & RENAME_EXCHANGE) != 0 ? "exchange" : (flags & RENAME_NOREPLACE) != 0 ? "rename_noreplace" : "rename";
}

PLAIN(renameat2, (int fd, const char *from, int other, const char *to, unsigned flags), judge_at(rename_op(flags), false, fd, from, other, to),
      (fd, from, other, to, flags))

INTERPOSE(long, syscall, (long number, long a, long b, long c, long d, long e, long f)) {
    if (number == SYS_renameat2)
        REFUSE(judge_at(rename_op(static_cast<unsigned>(e)), false, static_cast<int>(a), reinterpret_cast<const char *>(b), static_cast<int>(c),
                        reinterpret_cast<const char *>(d)));
    return real_syscall()(number, a, b, c, d, e, f);
}

// An open counts where it may make or empty a file.
static Verdict judge_open(int fd, const char *path, int flags) {
    if (!armed() || (flags & (O_CREAT | O_TRUNC)) == 0) return {};
    return judge_at("open", !exists(fd, path), fd, path);
}

#define OPEN(name, parameters, fd, call)                                                                                                                       \
    INTERPOSE(int, name, parameters) {                                                                                                                         \
        va_list rest;                                                                                                                                          \
        va_start(rest, flags);                                                                                                                                 \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;                                                                         \
        va_end(rest);                                                                                                                                          \
        REFUSE(judge_open(fd, path, flags));                                                                                                                   \
        return real_##name() call;                                                                                                                             \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int fd, const char *path, int flags, ...), fd, (fd, path, flags, mode))
OPEN(openat64, (int fd, const char *path, int flags, ...), fd, (fd, path, flags, mode))
