/* Count what a process asks the system to write under a folder, and let one of these calls fail.
 *
 * Preloaded (LD_PRELOAD), so that it also meets what Rust and C++ write. A call is a write point if it
 * makes or changes a file: open for writing, write, truncate, allocate, make a folder, rename, link,
 * wait for the disk. From the chosen point on every one fails as on a full disk, or the process dies.
 * A rename fails at its own point alone: a full disk refuses one where a folder has to grow for a new
 * name, and neither a name that was just given up nor one that is taken over.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_long points, chosen;
static atomic_int dies;

/* Count the write points under `under` from here on; `at` is the one to fail, from 1; 0 for none. */
void write_points_arm(const char *under, long at, int by_death) {
    strncpy(folder, under, sizeof folder - 1);
    points = 0;
    chosen = at;
    dies = by_death;
}

long write_points_seen(void) { return points; }

static int fails(int alone) {
    long point = ++points;
    if (!chosen || point < chosen || (alone && point > chosen)) return 0;
    if (dies) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}

static int name_fails(const char *path, int alone) {
    if (!folder[0] || !path) return 0;
    char full[PATH_MAX];
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        if (snprintf(full, sizeof full, "%s/%s", here, path) >= (int)sizeof full) return 0;
        path = full;
    }
    return !strncmp(path, folder, strlen(folder)) && fails(alone);
}

static int path_fails(const char *path) { return name_fails(path, 0); }

static int file_fails(int fd) {
    if (!folder[0]) return 0;
    int before = errno;
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return !strncmp(path, folder, strlen(folder)) && fails(0);
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define MODE \
    va_list rest; va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && path_fails(path)) return -1

int open(const char *path, int flags, ...) {
    REAL(int, "open", const char *, int, ...);
    MODE;
    return real(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    MODE;
    return real(path, flags, mode);
}

int openat(int at, const char *path, int flags, ...) {
    REAL(int, "openat", int, const char *, int, ...);
    MODE;
    return real(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
    REAL(int, "openat64", int, const char *, int, ...);
    MODE;
    return real(at, path, flags, mode);
}

FILE *fopen(const char *path, const char *mode) {
    REAL(FILE *, "fopen", const char *, const char *);
    if (strpbrk(mode, "wa+") && path_fails(path)) return NULL;
    return real(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, "fopen64", const char *, const char *);
    if (strpbrk(mode, "wa+") && path_fails(path)) return NULL;
    return real(path, mode);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    if (file_fails(fileno(file))) return 0;
    return real(data, size, count, file);
}

#define WRITES_FILE(result, name, declared, given) \
    result name declared { \
        REAL(result, #name, declared_##name); \
        if (file_fails(fd)) return -1; \
        return real given; \
    }

#define declared_write int, const void *, size_t
#define declared_pwrite int, const void *, size_t, off_t
#define declared_pwrite64 int, const void *, size_t, off64_t
#define declared_writev int, const struct iovec *, int
#define declared_ftruncate int, off_t
#define declared_ftruncate64 int, off64_t
#define declared_fallocate int, int, off_t, off_t
#define declared_fallocate64 int, int, off64_t, off64_t
#define declared_fsync int
#define declared_fdatasync int

WRITES_FILE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRITES_FILE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITES_FILE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITES_FILE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WRITES_FILE(int, ftruncate, (int fd, off_t size), (fd, size))
WRITES_FILE(int, ftruncate64, (int fd, off64_t size), (fd, size))
WRITES_FILE(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
WRITES_FILE(int, fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
WRITES_FILE(int, fsync, (int fd), (fd))
WRITES_FILE(int, fdatasync, (int fd), (fd))

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return path_fails(path) ? -1 : real(path, mode);
}

int mkdirat(int at, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    return path_fails(path) ? -1 : real(at, path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return name_fails(to, 1) ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return name_fails(to, 1) ? -1 : real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return name_fails(to, 1) ? -1 : real(a, from, b, to, flags);
}

int symlink(const char *target, const char *path) {
    REAL(int, "symlink", const char *, const char *);
    return path_fails(path) ? -1 : real(target, path);
}

int symlinkat(const char *target, int at, const char *path) {
    REAL(int, "symlinkat", const char *, int, const char *);
    return path_fails(path) ? -1 : real(target, at, path);
}
