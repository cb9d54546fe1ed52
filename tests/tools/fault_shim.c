/* A disk that fails at a chosen call: loaded with LD_PRELOAD, it counts the calls of the C library
 * that change files whose path begins with a prefix, and makes one of them the last or a failure.
 *
 * fault_arm() starts it; until then, and in processes that this one starts, every call goes through.
 * Calls that only read are not counted. What does not go through the C library (raw system calls,
 * pages of a mapped file) is not seen.
 *
 * cc -shared -fPIC -O1 -o fault_shim.so fault_shim.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* What happens at the chosen call. KILL: SIGKILL instead of it. HALF: half of a write is made, then
 * SIGKILL. FAIL: it alone fails. FAIL_ON: it and all that follow fail. FULL: from it on whatever
 * takes room fails, but for the first half of the first write: a disk that has filled. */
enum { COUNT, KILL, HALF, FAIL, FAIL_ON, FULL };
enum { GO_ON = -1, REFUSED = -2 }; /* else: how many bytes to write */

static char prefix[PATH_MAX], exception[PATH_MAX];
static long chosen;
static int action, error_number, mark = -1, trace = -1;
static pid_t armed;
static long calls;

#define NEXT(name, type, ...)                              \
    static type (*next_##name)(__VA_ARGS__);               \
    if (!next_##name) next_##name = dlsym(RTLD_NEXT, #name)

static ssize_t plain_write(int fd, const void *content, size_t size)
{
    NEXT(write, ssize_t, int, const void *, size_t);
    return next_write(fd, content, size);
}

/* Arms it for this process. but_not: paths that contain it are not counted; at: the number of the
 * call, from 1; mark_fd: where it is told that the fault happened; trace_fd: where each call is told
 * (-1: nowhere). An empty prefix disarms. */
void fault_arm(const char *path_prefix, const char *but_not, long at, int what, int error,
               int mark_fd, int trace_fd)
{
    armed = 0;
    snprintf(prefix, sizeof prefix, "%s", path_prefix);
    snprintf(exception, sizeof exception, "%s", but_not);
    chosen = at, action = what, error_number = error, mark = mark_fd, trace = trace_fd;
    calls = 0;
    if (*prefix) armed = getpid();
}

long fault_calls(void) { return calls; }

static int is_ours(const char *path)
{
    return !strncmp(path, prefix, strlen(prefix)) && !(*exception && strstr(path, exception));
}

static void path_of_fd(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *path, char *out)
{
    if (*path == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char parent[PATH_MAX];
    if (folder != AT_FDCWD)
        path_of_fd(folder, parent);
    else if (!getcwd(parent, sizeof parent))
        *parent = 0;
    if (snprintf(out, PATH_MAX, "%s/%s", parent, path) >= PATH_MAX) *out = 0;
}

static void tell(int fd, const char *call, const char *path)
{
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path + strlen(prefix));
    if (fd >= 0) (void)!plain_write(fd, line, length);
}

/* Counts a call on a path and decides what becomes of it. size: of a write, else -1. */
static ssize_t decide(const char *call, const char *path, ssize_t size, int takes_room)
{
    if (!armed || !is_ours(path) || getpid() != armed) return GO_ON;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    tell(trace, call, path);
    if (action == COUNT || number < chosen) return GO_ON;
    int is_first = number == chosen;
    if (!is_first && action != FAIL_ON && action != FULL) return GO_ON;
    if (action == FULL && !takes_room) {
        if (is_first) __atomic_add_fetch(&chosen, 1, __ATOMIC_SEQ_CST); /* the next is the first */
        return GO_ON;
    }
    if (is_first) tell(mark, call, path);
    if (size > 1 && is_first && (action == HALF || action == FULL)) return size / 2;
    if (action == KILL || action == HALF) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = error_number;
    return REFUSED;
}

static ssize_t decide_at(const char *call, int folder, const char *path, int takes_room)
{
    if (!armed) return GO_ON;
    char whole[PATH_MAX];
    path_at(folder, path, whole);
    return decide(call, whole, -1, takes_room);
}

static ssize_t decide_fd(const char *call, int fd, ssize_t size, int takes_room)
{
    if (!armed) return GO_ON;
    int before = errno;
    char path[PATH_MAX];
    path_of_fd(fd, path);
    errno = before;
    return decide(call, path, size, takes_room);
}

static void die_if_half(void)
{
    if (action != HALF) return;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* --- calls that open ----------------------------------------------------------------------- */

static int changes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }

static mode_t mode_of(int flags, va_list list)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0;
}

#define OPEN(name)                                                                               \
    int name(const char *path, int flags, ...)                                                   \
    {                                                                                            \
        NEXT(name, int, const char *, int, ...);                                                 \
        va_list list;                                                                            \
        va_start(list, flags);                                                                   \
        mode_t mode = mode_of(flags, list);                                                      \
        va_end(list);                                                                            \
        if (changes(flags) && decide_at("open", AT_FDCWD, path, flags & O_CREAT) == REFUSED)      \
            return -1;                                                                           \
        return next_##name(path, flags, mode);                                                   \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                             \
    int name(int folder, const char *path, int flags, ...)                                       \
    {                                                                                            \
        NEXT(name, int, int, const char *, int, ...);                                            \
        va_list list;                                                                            \
        va_start(list, flags);                                                                   \
        mode_t mode = mode_of(flags, list);                                                      \
        va_end(list);                                                                            \
        if (changes(flags) && decide_at("open", folder, path, flags & O_CREAT) == REFUSED)        \
            return -1;                                                                           \
        return next_##name(folder, path, flags, mode);                                           \
    }
OPENAT(openat)
OPENAT(openat64)

/* --- calls that write ---------------------------------------------------------------------- */

ssize_t write(int fd, const void *content, size_t size)
{
    ssize_t found = decide_fd("write", fd, size, 1);
    if (found == REFUSED) return -1;
    if (found == GO_ON) return plain_write(fd, content, size);
    ssize_t written = plain_write(fd, content, found);
    die_if_half();
    return written;
}

#define PWRITE(name)                                                                             \
    ssize_t name(int fd, const void *content, size_t size, off64_t offset)                       \
    {                                                                                            \
        NEXT(name, ssize_t, int, const void *, size_t, off64_t);                                 \
        ssize_t found = decide_fd("write", fd, size, 1);                                         \
        if (found == REFUSED) return -1;                                                         \
        if (found == GO_ON) return next_##name(fd, content, size, offset);                       \
        ssize_t written = next_##name(fd, content, found, offset);                               \
        die_if_half();                                                                           \
        return written;                                                                          \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    NEXT(writev, ssize_t, int, const struct iovec *, int);
    ssize_t found = decide_fd("write", fd, count ? (ssize_t)pieces[0].iov_len : -1, 1);
    if (found == REFUSED) return -1;
    if (found == GO_ON) return next_writev(fd, pieces, count);
    ssize_t written = plain_write(fd, pieces[0].iov_base, found);
    die_if_half();
    return written;
}

/* numpy writes arrays through stdio, whose own calls of write() cannot be seen */
size_t fwrite(const void *content, size_t size, size_t count, FILE *file)
{
    NEXT(fwrite, size_t, const void *, size_t, size_t, FILE *);
    ssize_t found = decide_fd("write", fileno(file), size * count, 1);
    if (found == REFUSED) return 0;
    if (found == GO_ON) return next_fwrite(content, size, count, file);
    size_t written = next_fwrite(content, 1, found, file);
    fflush(file);
    die_if_half();
    errno = error_number;
    return written / size;
}

#define ALLOCATE(name)                                                                           \
    int name(int fd, off64_t offset, off64_t size)                                               \
    {                                                                                            \
        NEXT(name, int, int, off64_t, off64_t);                                                  \
        return decide_fd("allocate", fd, -1, 1) == REFUSED ? errno                               \
                                                           : next_##name(fd, offset, size);      \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

/* --- calls on open files ------------------------------------------------------------------- */

#define ON_FILE(name, label)                                                                     \
    int name(int fd)                                                                             \
    {                                                                                            \
        NEXT(name, int, int);                                                                    \
        return decide_fd(label, fd, -1, 0) == REFUSED ? -1 : next_##name(fd);                    \
    }
ON_FILE(fsync, "fsync")
ON_FILE(fdatasync, "fsync")

#define FTRUNCATE(name)                                                                          \
    int name(int fd, off64_t size)                                                               \
    {                                                                                            \
        NEXT(name, int, int, off64_t);                                                           \
        return decide_fd("truncate", fd, -1, 0) == REFUSED ? -1 : next_##name(fd, size);         \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

int fchmod(int fd, mode_t mode)
{
    NEXT(fchmod, int, int, mode_t);
    return decide_fd("chmod", fd, -1, 0) == REFUSED ? -1 : next_fchmod(fd, mode);
}

/* --- calls on paths ------------------------------------------------------------------------ */

#define TRUNCATE(name)                                                                           \
    int name(const char *path, off64_t size)                                                     \
    {                                                                                            \
        NEXT(name, int, const char *, off64_t);                                                  \
        return decide_at("truncate", AT_FDCWD, path, 0) == REFUSED ? -1                          \
                                                                   : next_##name(path, size);    \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

int chmod(const char *path, mode_t mode)
{
    NEXT(chmod, int, const char *, mode_t);
    return decide_at("chmod", AT_FDCWD, path, 0) == REFUSED ? -1 : next_chmod(path, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags)
{
    NEXT(fchmodat, int, int, const char *, mode_t, int);
    if (decide_at("chmod", folder, path, 0) == REFUSED) return -1;
    return next_fchmodat(folder, path, mode, flags);
}

int mkdir(const char *path, mode_t mode)
{
    NEXT(mkdir, int, const char *, mode_t);
    return decide_at("mkdir", AT_FDCWD, path, 1) == REFUSED ? -1 : next_mkdir(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    NEXT(mkdirat, int, int, const char *, mode_t);
    return decide_at("mkdir", folder, path, 1) == REFUSED ? -1 : next_mkdirat(folder, path, mode);
}

int rmdir(const char *path)
{
    NEXT(rmdir, int, const char *);
    return decide_at("rmdir", AT_FDCWD, path, 0) == REFUSED ? -1 : next_rmdir(path);
}

int unlink(const char *path)
{
    NEXT(unlink, int, const char *);
    return decide_at("unlink", AT_FDCWD, path, 0) == REFUSED ? -1 : next_unlink(path);
}

int unlinkat(int folder, const char *path, int flags)
{
    NEXT(unlinkat, int, int, const char *, int);
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return decide_at(call, folder, path, 0) == REFUSED ? -1 : next_unlinkat(folder, path, flags);
}

/* a renaming is known by where it leads to */
int rename(const char *from, const char *to)
{
    NEXT(rename, int, const char *, const char *);
    return decide_at("rename", AT_FDCWD, to, 0) == REFUSED ? -1 : next_rename(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    NEXT(renameat, int, int, const char *, int, const char *);
    if (decide_at("rename", to_folder, to, 0) == REFUSED) return -1;
    return next_renameat(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags)
{
    NEXT(renameat2, int, int, const char *, int, const char *, unsigned);
    if (decide_at("rename", to_folder, to, 0) == REFUSED) return -1;
    return next_renameat2(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to)
{
    NEXT(link, int, const char *, const char *);
    return decide_at("link", AT_FDCWD, to, 1) == REFUSED ? -1 : next_link(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
    NEXT(linkat, int, int, const char *, int, const char *, int);
    if (decide_at("link", to_folder, to, 1) == REFUSED) return -1;
    return next_linkat(from_folder, from, to_folder, to, flags);
}

int symlink(const char *content, const char *path)
{
    NEXT(symlink, int, const char *, const char *);
    return decide_at("link", AT_FDCWD, path, 1) == REFUSED ? -1 : next_symlink(content, path);
}

int symlinkat(const char *content, int folder, const char *path)
{
    NEXT(symlinkat, int, const char *, int, const char *);
    if (decide_at("link", folder, path, 1) == REFUSED) return -1;
    return next_symlinkat(content, folder, path);
}

ssize_t sendfile(int to, int from, off64_t *offset, size_t size)
{
    NEXT(sendfile, ssize_t, int, int, off64_t *, size_t);
    return decide_fd("write", to, -1, 1) == REFUSED ? -1 : next_sendfile(to, from, offset, size);
}
