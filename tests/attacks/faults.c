/* Preloaded before the C library: counts a process's changes to files below one directory, and lets one of them fail.

   Each change has a number, from 1, in the order in which a process makes them. `fault_arm` says which number meets
   which fault; children inherit it. Reading is neither counted nor changed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NONE, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, HALF, ZERO };
enum answer { GO, GO_AND_DIE, REFUSE, NOTHING };
enum { CALLS = 1 << 14, TEXT = 256 };

static char root[PATH_MAX];
static long at;
static int armed, number, for_good;
static atomic_long calls;
static struct {
  const char *name;
  int counts;
  char path[TEXT];
} seen[CALLS];

/* Which directory to watch: an absolute path without links, or "" for none. The count begins again. */
void fault_watch(const char *directory) {
  snprintf(root, sizeof root, "%s", directory);
  armed = NONE;
  atomic_store(&calls, 0);
}

/* Let call `n` of this process meet a fault; with `forever`, every call from `n` on. */
void fault_arm(long n, int kind, int error, int forever) {
  at = n, number = error, for_good = forever;
  armed = kind;
}

long fault_count(void) { return atomic_load(&calls); }

/* Of call `n`: its name; whether it returns a count of bytes; the path that it changes. */
const char *fault_name(long n) { return n >= 1 && n <= CALLS && seen[n - 1].name ? seen[n - 1].name : ""; }
int fault_counts(long n) { return n >= 1 && n <= CALLS ? seen[n - 1].counts : 0; }
const char *fault_path(long n) { return n >= 1 && n <= CALLS ? seen[n - 1].path : ""; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static int below(const char *path) {
  size_t length = strlen(root);
  return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* Where a descriptor's file lies: 0 where the kernel does not say. */
static int place(int fd, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, out, PATH_MAX - 1);
  out[length > 0 ? length : 0] = 0;
  return length > 0;
}

static int watched_fd(int fd, char *out) {
  int before = errno, is = root[0] && fd > 2 && place(fd, out) && below(out);
  errno = before;
  return is;
}

static int watched_path(int directory, const char *path, char *out) {
  char start[PATH_MAX];
  if (!root[0] || !path) return 0;
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return below(out);
  }
  int before = errno, is = directory == AT_FDCWD ? getcwd(start, sizeof start) != NULL : place(directory, start);
  errno = before;
  if (!is) return 0;
  if ((size_t)snprintf(out, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) out[PATH_MAX - 1] = 0;
  return below(out);
}

/* Count a call, and decide what becomes of it. `bytes`, where the call returns a count, may be made smaller. */
static enum answer decide(const char *name, const char *path, size_t *bytes) {
  long n = atomic_fetch_add(&calls, 1) + 1;
  if (n <= CALLS) {
    seen[n - 1].name = name;
    seen[n - 1].counts = bytes ? *bytes > 1 ? 2 : 1 : 0;
    snprintf(seen[n - 1].path, TEXT, "%s", path + strlen(root));
  }
  if (armed == NONE || (for_good ? n < at : n != at)) return GO;
  switch (armed) {
    case KILL_BEFORE: die(); return GO;
    case KILL_AFTER: return GO_AND_DIE;
    case KILL_HALFWAY:
      if (bytes) *bytes /= 2;
      return GO_AND_DIE;
    case FAIL: errno = number; return REFUSE;
    case HALF:
      if (bytes && *bytes > 1) *bytes /= 2;
      return GO;
    case ZERO: return bytes ? NOTHING : GO;
    default: return GO;
  }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The body of every function below: `watched` fills `where`; `bytes` is the count's address, or NULL. */
#define PASS(name, watched, bytes, arguments)           \
  char where[PATH_MAX];                                 \
  static __typeof__(&name) real;                        \
  if (!real) real = REAL(name);                         \
  enum answer answer = GO;                              \
  if (watched) answer = decide(#name, where, bytes);    \
  if (answer == REFUSE) return -1;                      \
  if (answer == NOTHING) return 0;                      \
  __typeof__(real arguments) result = real arguments;   \
  if (answer == GO_AND_DIE) die();                      \
  return result

#define MODE(flags)                                     \
  mode_t mode = 0;                                      \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list rest;                                       \
    va_start(rest, flags);                              \
    mode = va_arg(rest, mode_t);                        \
    va_end(rest);                                       \
  }

#define MAKES(flags) ((flags) & (O_CREAT | O_TRUNC) || ((flags) & O_TMPFILE) == O_TMPFILE)

#define OPEN(name)                                      \
  int name(const char *path, int flags, ...) {          \
    MODE(flags)                                         \
    PASS(name, MAKES(flags) && watched_path(AT_FDCWD, path, where), NULL, (path, flags, mode)); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                    \
  int name(int fd, const char *path, int flags, ...) {  \
    MODE(flags)                                         \
    PASS(name, MAKES(flags) && watched_path(fd, path, where), NULL, (fd, path, flags, mode)); \
  }
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode) { PASS(creat, watched_path(AT_FDCWD, path, where), NULL, (path, mode)); }

ssize_t write(int fd, const void *data, size_t n) { PASS(write, watched_fd(fd, where), &n, (fd, data, n)); }

#define PWRITE(name)                                    \
  ssize_t name(int fd, const void *data, size_t n, off_t offset) { \
    PASS(name, watched_fd(fd, where), &n, (fd, data, n, offset)); \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

/* Vectors are not cut short: fp4cast writes none. */
ssize_t writev(int fd, const struct iovec *parts, int n) { PASS(writev, watched_fd(fd, where), NULL, (fd, parts, n)); }

#define PWRITEV(name)                                   \
  ssize_t name(int fd, const struct iovec *parts, int n, off_t offset) { \
    PASS(name, watched_fd(fd, where), NULL, (fd, parts, n, offset)); \
  }
PWRITEV(pwritev)
PWRITEV(pwritev64)

/* The bytes that a copy will find: half of the 8 MB that are asked for is no fault for a file of 50. */
static size_t to_come(int from, const off_t *start, size_t n) {
  struct stat about;
  int before = errno;
  off_t position = start ? *start : lseek(from, 0, SEEK_CUR);
  if (!fstat(from, &about) && position >= 0 && about.st_size > position && (size_t)(about.st_size - position) < n)
    n = about.st_size - position;
  errno = before;
  return n;
}

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *offset, size_t n, unsigned flags) {
  n = to_come(from, start, n);
  PASS(copy_file_range, watched_fd(to, where), &n, (from, start, to, offset, n, flags));
}

#define SENDFILE(name)                                  \
  ssize_t name(int to, int from, off_t *offset, size_t n) { \
    n = to_come(from, offset, n);                       \
    PASS(name, watched_fd(to, where), &n, (to, from, offset, n)); \
  }
SENDFILE(sendfile)
SENDFILE(sendfile64)

#define TRUNCATE(name)                                  \
  int name(int fd, off_t size) { PASS(name, watched_fd(fd, where), NULL, (fd, size)); }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ALLOCATE(name)                                  \
  int name(int fd, int mode, off_t offset, off_t size) { \
    PASS(name, watched_fd(fd, where), NULL, (fd, mode, offset, size)); \
  }
ALLOCATE(fallocate)
ALLOCATE(fallocate64)

/* Nobody cuts the power here, so that nothing has to wait for the disk. */
#define SYNC(name)                                      \
  int name(int fd) {                                    \
    char where[PATH_MAX];                               \
    if (!watched_fd(fd, where)) return REAL(name)(fd);  \
    enum answer answer = decide(#name, where, NULL);    \
    if (answer == GO_AND_DIE) die();                    \
    return answer == REFUSE ? -1 : 0;                   \
  }
SYNC(fsync)
SYNC(fdatasync)
SYNC(syncfs)

/* A name that leaves counts like one that comes. */
static int either(int from_fd, const char *from, int to_fd, const char *to, char *where) {
  return watched_path(to_fd, to, where) || watched_path(from_fd, from, where);
}

int rename(const char *from, const char *to) {
  PASS(rename, either(AT_FDCWD, from, AT_FDCWD, to, where), NULL, (from, to));
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
  PASS(renameat, either(from_fd, from, to_fd, to, where), NULL, (from_fd, from, to_fd, to));
}
int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
  PASS(renameat2, either(from_fd, from, to_fd, to, where), NULL, (from_fd, from, to_fd, to, flags));
}
int link(const char *from, const char *to) {
  PASS(link, either(AT_FDCWD, from, AT_FDCWD, to, where), NULL, (from, to));
}
int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
  PASS(linkat, either(from_fd, from, to_fd, to, where), NULL, (from_fd, from, to_fd, to, flags));
}
int symlink(const char *to, const char *path) {
  PASS(symlink, watched_path(AT_FDCWD, path, where), NULL, (to, path));
}
int symlinkat(const char *to, int fd, const char *path) {
  PASS(symlinkat, watched_path(fd, path, where), NULL, (to, fd, path));
}
int unlink(const char *path) { PASS(unlink, watched_path(AT_FDCWD, path, where), NULL, (path)); }
int unlinkat(int fd, const char *path, int flags) {
  PASS(unlinkat, watched_path(fd, path, where), NULL, (fd, path, flags));
}
int rmdir(const char *path) { PASS(rmdir, watched_path(AT_FDCWD, path, where), NULL, (path)); }
int mkdir(const char *path, mode_t mode) { PASS(mkdir, watched_path(AT_FDCWD, path, where), NULL, (path, mode)); }
int mkdirat(int fd, const char *path, mode_t mode) {
  PASS(mkdirat, watched_path(fd, path, where), NULL, (fd, path, mode));
}
int chmod(const char *path, mode_t mode) { PASS(chmod, watched_path(AT_FDCWD, path, where), NULL, (path, mode)); }
int fchmod(int fd, mode_t mode) { PASS(fchmod, watched_fd(fd, where), NULL, (fd, mode)); }
int fchmodat(int fd, const char *path, mode_t mode, int flags) {
  PASS(fchmodat, watched_path(fd, path, where), NULL, (fd, path, mode, flags));
}
int utimensat(int fd, const char *path, const struct timespec times[2], int flags) {
  PASS(utimensat, watched_path(fd, path, where), NULL, (fd, path, times, flags));
}
int futimens(int fd, const struct timespec times[2]) { PASS(futimens, watched_fd(fd, where), NULL, (fd, times)); }
