/* Makes file calls fail: preloaded into a process that then says which.
 *
 * fault_arm(n, error, times, reads, prefix): the n-th call from now on that touches a file below
 * `prefix` fails with `error`, and so do the `times - 1` after it (times 0: all after it); n = 0
 * only counts. `reads`: whether reading and opening to read count too. fault_calls() says how many
 * calls counted since.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static long first, times, with_reads;
static int error_number, armed;
static char prefix[4096];

void fault_arm(long n, int error, long count, long reads, const char *below) {
    armed = 0;
    snprintf(prefix, sizeof prefix, "%s", below);
    first = n;
    error_number = error;
    times = count;
    with_reads = reads;
    atomic_store(&calls, 0);
    armed = 1;
}

void fault_disarm(void) { armed = 0; }

long fault_calls(void) { return atomic_load(&calls); }

static int hit(void) {
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (first == 0 || n < first || (times && n >= first + times)) return 0;
    errno = error_number;
    return 1;
}

static int path_fails(const char *path, int reading) {
    if (!armed || (reading && !with_reads)) return 0;
    char whole[8192];
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        if (!getcwd(whole, 4096)) return 0;
        strncat(whole, "/", 2);
        strncat(whole, path, 4000);
    }
    return strncmp(whole, prefix, strlen(prefix)) == 0 && hit();
}

static int file_fails(int fd, int reading) {
    if (!armed || (reading && !with_reads)) return 0;
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strncmp(path, prefix, strlen(prefix)) == 0 && hit();
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags)                                      \
    mode_t mode = 0;                                     \
    if ((flags) & (O_CREAT | O_TMPFILE)) {               \
        va_list list;                                    \
        va_start(list, flags);                           \
        mode = va_arg(list, mode_t);                     \
        va_end(list);                                    \
    }
#define READING(flags) (((flags) & (O_ACCMODE | O_CREAT | O_TRUNC)) == O_RDONLY)

int open(const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(path, READING(flags)) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(path, READING(flags)) ? -1 : NEXT(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(path, READING(flags)) ? -1 : NEXT(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return path_fails(path, READING(flags)) ? -1 : NEXT(openat64)(folder, path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t size) {
    return file_fails(fd, 0) ? -1 : NEXT(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return file_fails(fd, 0) ? -1 : NEXT(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return file_fails(fd, 0) ? -1 : NEXT(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return file_fails(fd, 0) ? -1 : NEXT(writev)(fd, parts, count);
}
ssize_t read(int fd, void *data, size_t size) {
    return file_fails(fd, 1) ? -1 : NEXT(read)(fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) {
    return file_fails(fd, 1) ? -1 : NEXT(pread)(fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    return file_fails(fd, 1) ? -1 : NEXT(pread64)(fd, data, size, at);
}
int fsync(int fd) { return file_fails(fd, 0) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return file_fails(fd, 0) ? -1 : NEXT(fdatasync)(fd); }
int ftruncate(int fd, off_t size) { return file_fails(fd, 0) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) {
    return file_fails(fd, 0) ? -1 : NEXT(ftruncate64)(fd, size);
}
int mkdir(const char *path, mode_t mode) {
    return path_fails(path, 0) ? -1 : NEXT(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
    return path_fails(to, 0) ? -1 : NEXT(rename)(from, to);
}
