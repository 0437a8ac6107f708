/* LD_PRELOAD library: fails, or kills the process at, the n-th operation that changes files below a folder, or the n-th that
   reads them. Whoever calls it (Python, torch's C++, Rust, Arrow) goes through libc. fault_arm(folder, n, error, last, reads):
   operations n..last fail with errno `error`; error 0 sends SIGKILL. fault_count() is the number of operations since then. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first, last, count;
static int error, armed;  /* armed: for CHANGE or READ */
enum { CHANGE, READ };

void fault_arm(const char *path, long n, int number, long until, int reads) {
  strncpy(folder, path, sizeof folder - 1);
  first = n, last = until, error = number, count = 0, armed = reads;
}
long fault_count(void) { return count; }

static int below(const char *path) { return folder[0] && !strncmp(path, folder, strlen(folder)); }

static int below_fd(int fd) {
  char link[64], path[PATH_MAX];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}

static int below_at(int fd, const char *path) {
  char cwd[PATH_MAX], whole[2 * PATH_MAX];
  if (!folder[0] || !path) return 0;
  if (path[0] == '/') return below(path);
  if (fd != AT_FDCWD) return below_fd(fd);
  if (!getcwd(cwd, sizeof cwd)) return 0;
  snprintf(whole, sizeof whole, "%s/%s", cwd, path);
  return below(whole);
}

/* Counts an operation; nonzero if it has to fail. */
static int strikes(int kind) {
  if (kind != armed) return 0;
  long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  if (n < first || n > last) return 0;
  if (!error) kill(getpid(), SIGKILL);
  errno = error;
  return 1;
}

#define REAL(name)                  \
  static __typeof__(&name) real;    \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAPPED(kind, type, name, parameters, arguments, where) \
  type name parameters {                                        \
    REAL(name);                                                 \
    if (armed == (kind) && (where) && strikes(kind)) return (type)-1; \
    return real arguments;                                      \
  }
#define WRAP(...) WRAPPED(CHANGE, __VA_ARGS__)
#define WRAP_READ(...) WRAPPED(READ, __VA_ARGS__)
#define KIND(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) ? CHANGE : READ)
#define MODE                         \
  mode_t mode = 0;                   \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list list;                    \
    va_start(list, flags);           \
    mode = va_arg(list, mode_t);     \
    va_end(list);                    \
  }
#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    MODE REAL(name);                                                            \
    if (below_at(AT_FDCWD, path) && strikes(KIND(flags))) return -1;            \
    return real(path, flags, mode);                                             \
  }
#define OPENAT(name)                                                            \
  int name(int fd, const char *path, int flags, ...) {                          \
    MODE REAL(name);                                                            \
    if (below_at(fd, path) && strikes(KIND(flags))) return -1;                  \
    return real(fd, path, flags, mode);                                         \
  }
#define FOPEN(name)                                                                         \
  FILE *name(const char *path, const char *mode) {                                          \
    REAL(name);                                                                             \
    int kind = strpbrk(mode, "wa+") ? CHANGE : READ;                                        \
    if (below_at(AT_FDCWD, path) && strikes(kind)) return NULL;                             \
    return real(path, mode);                                                                \
  }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)
WRAP(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), below_fd(fd))
WRAP(ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), below_fd(fd))
WRAP(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), below_fd(fd))
WRAP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), below_fd(fd))
WRAP(int, fsync, (int fd), (fd), below_fd(fd))
WRAP(int, fdatasync, (int fd), (fd), below_fd(fd))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size), below_fd(fd))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size), below_fd(fd))
WRAP(int, truncate, (const char *path, off_t size), (path, size), below_at(AT_FDCWD, path))
WRAP(int, truncate64, (const char *path, off64_t size), (path, size), below_at(AT_FDCWD, path))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), below_at(AT_FDCWD, path))
WRAP(int, rmdir, (const char *path), (path), below_at(AT_FDCWD, path))
WRAP(int, unlink, (const char *path), (path), below_at(AT_FDCWD, path))
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), below_at(fd, path))
WRAP(int, rename, (const char *from, const char *to), (from, to), below_at(AT_FDCWD, to))
WRAP(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), below_at(b, to))
WRAP(int, symlink, (const char *to, const char *path), (to, path), below_at(AT_FDCWD, path))
WRAP_READ(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), below_fd(fd))
WRAP_READ(ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at), below_fd(fd))
WRAP_READ(ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at), below_fd(fd))
WRAP_READ(void *, mmap, (void *to, size_t size, int how, int flags, int fd, off_t at), (to, size, how, flags, fd, at), fd >= 0 && below_fd(fd))
WRAP_READ(void *, mmap64, (void *to, size_t size, int how, int flags, int fd, off64_t at), (to, size, how, flags, fd, at), fd >= 0 && below_fd(fd))
