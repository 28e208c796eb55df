/* Records what a process does to the files below one directory: preloaded (LD_PRELOAD), asked by recording.py.
 *
 * Every call that changes a file, a size or a name is one record, in the order in which the kernel has seen them: all
 * of them go through one lock. A sync has two, before and after, and does not hold the lock meanwhile, so that what
 * others write during it is seen to be during it. Stores to a shared mapping leave no call: each mapping is compared,
 * sector by sector, with what it was at the last record, and what differs is recorded as a write before the next one.
 *
 * A call that could change a tracked file and is not understood is recorded as such; recording.py refuses the log.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define FDS 4096
#define MAPPINGS 256
#define SECTOR 512

enum { OP_MARK = 1, OP_CREATE, OP_MKDIR, OP_WRITE, OP_PUNCH, OP_SIZE, OP_SYNC_BEGIN, OP_SYNC_END, OP_PAGES_BEGIN,
       OP_PAGES_END, OP_RENAME, OP_EXCHANGE, OP_UNLINK, OP_OTHER };

struct record {
    uint32_t op, size;               /* size: of the data that follow */
    uint64_t inode, offset, length;
};

struct mapping {
    char *at, *shadow;
    size_t length;
    uint64_t inode;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *log_data;
static size_t log_size, log_room;
static volatile int recording;
static unsigned int delay_us, delay_seed;
static long pretended_type;          /* what fstatfs says the file system is; 0: the truth */
static char prefix[4096];
static uint64_t fd_inode[FDS];       /* 0: not tracked */
static char *fd_path[FDS];           /* of directories */
static struct mapping mappings[MAPPINGS];

#define REAL(name) ({ \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
    real; \
})

static void put(const void *data, size_t size)
{
    if (log_size + size > log_room) {
        log_room = (log_size + size) * 2 + 65536;
        log_data = realloc(log_data, log_room);
        if (!log_data)
            abort();
    }
    memcpy(log_data + log_size, data, size);
    log_size += size;
}

static void note(uint32_t op, uint64_t inode, uint64_t offset, uint64_t length, const void *data, size_t size)
{
    struct record r = {op, (uint32_t)size, inode, offset, length};
    put(&r, sizeof r);
    if (size)
        put(data, size);
}

static void look_at(struct mapping *m)
{
    char now[SECTOR];
    size_t at, size;
    for (at = 0; at < m->length; at += SECTOR) {
        if (at % 65536 == 0 && m->length - at >= 65536 && !memcmp(m->at + at, m->shadow + at, 65536)) {
            at += 65536 - SECTOR;
            continue;
        }
        size = m->length - at < SECTOR ? m->length - at : SECTOR;
        memcpy(now, m->at + at, size);
        if (!memcmp(now, m->shadow + at, size))
            continue;
        note(OP_WRITE, m->inode, at, 1, now, size);      /* length 1: by a store */
        memcpy(m->shadow + at, now, size);
    }
}

static void look_at_mappings(void)
{
    int i;
    for (i = 0; i < MAPPINGS; i++)
        if (mappings[i].at)
            look_at(&mappings[i]);
}

static void shadow_write(uint64_t inode, const char *data, uint64_t offset, size_t size)
{
    int i;
    for (i = 0; i < MAPPINGS; i++) {
        struct mapping *m = &mappings[i];
        if (m->at && m->inode == inode && offset < m->length)
            memcpy(m->shadow + offset, data, size < m->length - offset ? size : m->length - offset);
    }
}

static uint64_t tracked(int fd)
{
    return recording && fd >= 0 && fd < FDS ? fd_inode[fd] : 0;
}

static int begin(void)
{
    pthread_mutex_lock(&lock);
    if (recording)
        look_at_mappings();
    return 1;
}

static void end(void)
{
    int saved = errno;
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* -- asked by recording.py */

void recorder_start(const char *directory, unsigned int sync_delay_us, unsigned int seed, long file_system_type)
{
    pthread_mutex_lock(&lock);
    snprintf(prefix, sizeof prefix, "%s/", directory);
    log_size = 0;
    delay_us = sync_delay_us;
    delay_seed = seed;
    pretended_type = file_system_type;
    memset(fd_inode, 0, sizeof fd_inode);
    recording = 1;
    pthread_mutex_unlock(&lock);
}

const char *recorder_stop(size_t *size)
{
    int i;
    begin();
    recording = 0;
    for (i = 0; i < MAPPINGS; i++) {
        free(mappings[i].shadow);
        memset(&mappings[i], 0, sizeof mappings[i]);
    }
    *size = log_size;
    end();
    return log_data;
}

void recorder_mark(const char *text, size_t size)
{
    begin();
    if (recording)
        note(OP_MARK, 0, 0, 0, text, size);
    end();
}

/* -- names */

static int resolve(int directory, const char *name, char *out, size_t room)
{
    if (!recording || !name)
        return 0;
    if (name[0] == '/')
        snprintf(out, room, "%s", name);
    else if (directory >= 0 && directory < FDS && fd_path[directory] && fd_inode[directory])
        snprintf(out, room, "%s/%s", fd_path[directory], name);
    else
        return 0;
    return strncmp(out, prefix, strlen(prefix)) == 0
        || (strlen(out) + 1 == strlen(prefix) && strncmp(out, prefix, strlen(out)) == 0);   /* the directory itself */
}

static int open_any(int directory, const char *name, int flags, int mode)
{
    char path[4352];
    struct stat before, after;
    int fd, there;
    if (!resolve(directory, name, path, sizeof path))
        return syscall(SYS_openat, directory, name, flags, mode);
    begin();
    there = stat(path, &before) == 0;
    fd = syscall(SYS_openat, directory, name, flags, mode);
    if (fd >= 0 && fd < FDS && fstat(fd, &after) == 0) {
        if (!there)
            note(OP_CREATE, after.st_ino, 0, 0, path, strlen(path));
        else if (flags & O_TRUNC)
            note(OP_SIZE, after.st_ino, 0, 0, NULL, 0);
        fd_inode[fd] = after.st_ino;
        free(fd_path[fd]);
        fd_path[fd] = strdup(path);
    }
    end();
    return fd;
}

#define OPEN_MODE(flags) ({ \
    int mode_ = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list list_; \
        va_start(list_, flags); \
        mode_ = va_arg(list_, int); \
        va_end(list_); \
    } \
    mode_; \
})

int open(const char *name, int flags, ...) { return open_any(AT_FDCWD, name, flags, OPEN_MODE(flags)); }
int open64(const char *name, int flags, ...) { return open_any(AT_FDCWD, name, flags, OPEN_MODE(flags)); }
int openat(int d, const char *name, int flags, ...) { return open_any(d, name, flags, OPEN_MODE(flags)); }
int openat64(int d, const char *name, int flags, ...) { return open_any(d, name, flags, OPEN_MODE(flags)); }

int close(int fd)
{
    if (recording && fd >= 0 && fd < FDS && fd_inode[fd]) {
        begin();
        fd_inode[fd] = 0;
        end();
    }
    return syscall(SYS_close, fd);
}

static int two_names(uint32_t op, int from, const char *source, int to, const char *target, unsigned int flags)
{
    char a[4352], b[4352], both[8800];
    int is_tracked = resolve(from, source, a, sizeof a) | resolve(to, target, b, sizeof b) << 1, result;
    if (!is_tracked)
        return syscall(SYS_renameat2, from, source, to, target, flags);
    begin();
    result = syscall(SYS_renameat2, from, source, to, target, flags);
    if (!result) {
        if (is_tracked != 3 || (flags & ~RENAME_EXCHANGE))
            note(OP_OTHER, 0, 0, 0, "rename", 6);
        note(op, 0, 0, 0, both, snprintf(both, sizeof both, "%s\n%s", a, b));
    }
    end();
    return result;
}

int rename(const char *a, const char *b) { return two_names(OP_RENAME, AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int f, const char *a, int t, const char *b) { return two_names(OP_RENAME, f, a, t, b, 0); }
int renameat2(int f, const char *a, int t, const char *b, unsigned int flags)
{
    return two_names(flags & RENAME_EXCHANGE ? OP_EXCHANGE : OP_RENAME, f, a, t, b, flags);
}

static int make_directory(int directory, const char *name, mode_t mode)
{
    char path[4352];
    struct stat made;
    int result;
    if (!resolve(directory, name, path, sizeof path))
        return syscall(SYS_mkdirat, directory, name, mode);
    begin();
    result = syscall(SYS_mkdirat, directory, name, mode);
    if (!result && stat(path, &made) == 0)
        note(OP_MKDIR, made.st_ino, 0, 0, path, strlen(path));
    end();
    return result;
}

int mkdir(const char *name, mode_t mode) { return make_directory(AT_FDCWD, name, mode); }
int mkdirat(int directory, const char *name, mode_t mode) { return make_directory(directory, name, mode); }

static int take_name(int directory, const char *name, int flags)
{
    char path[4352];
    int result;
    if (!resolve(directory, name, path, sizeof path))
        return syscall(SYS_unlinkat, directory, name, flags);
    begin();
    result = syscall(SYS_unlinkat, directory, name, flags);
    if (!result)
        note(OP_UNLINK, 0, 0, 0, path, strlen(path));
    end();
    return result;
}

int unlink(const char *name) { return take_name(AT_FDCWD, name, 0); }
int unlinkat(int directory, const char *name, int flags) { return take_name(directory, name, flags); }
int rmdir(const char *name) { return take_name(AT_FDCWD, name, AT_REMOVEDIR); }

/* -- contents */

static ssize_t write_at(int fd, const void *data, size_t size, off_t offset)
{
    uint64_t inode = tracked(fd);
    ssize_t got;
    if (!inode)
        return syscall(SYS_pwrite64, fd, data, size, offset);
    begin();
    got = syscall(SYS_pwrite64, fd, data, size, offset);
    if (got > 0) {
        note(OP_WRITE, inode, offset, 0, data, got);
        shadow_write(inode, data, offset, got);
    }
    end();
    return got;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size)
{
    uint64_t inode = tracked(fd);
    ssize_t got;
    off_t offset;
    if (!inode)
        return syscall(SYS_write, fd, data, size);
    begin();
    offset = lseek(fd, 0, SEEK_CUR);
    got = syscall(SYS_write, fd, data, size);
    if (got > 0)
        note(OP_WRITE, inode, offset, 0, data, got);
    end();
    return got;
}

static int set_size(int fd, off_t size)
{
    uint64_t inode = tracked(fd);
    int result;
    if (!inode)
        return syscall(SYS_ftruncate, fd, size);
    begin();
    result = syscall(SYS_ftruncate, fd, size);
    if (!result)
        note(OP_SIZE, inode, 0, size, NULL, 0);
    end();
    return result;
}

int ftruncate(int fd, off_t size) { return set_size(fd, size); }
int ftruncate64(int fd, off_t size) { return set_size(fd, size); }

static int allocate(int fd, int mode, off_t offset, off_t size)
{
    uint64_t inode = tracked(fd);
    int result, i;
    if (!inode)
        return syscall(SYS_fallocate, fd, mode, offset, size);
    begin();
    result = syscall(SYS_fallocate, fd, mode, offset, size);
    if (!result && mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) {
        note(OP_PUNCH, inode, offset, size, NULL, 0);
        for (i = 0; i < MAPPINGS; i++)
            if (mappings[i].at && mappings[i].inode == inode)
                note(OP_OTHER, 0, 0, 0, "punch of what is mapped", 23);
    } else if (!result && mode)
        note(OP_OTHER, 0, 0, 0, "fallocate", 9);
    end();
    return result;
}

int fallocate(int fd, int mode, off_t offset, off_t size) { return allocate(fd, mode, offset, size); }
int fallocate64(int fd, int mode, off_t offset, off_t size) { return allocate(fd, mode, offset, size); }

/* -- syncs */

static int two_records(uint32_t op, int fd, long call, off_t offset, off_t size, unsigned int flags)
{
    uint64_t inode = tracked(fd);
    int result;
    if (!inode)
        return syscall(call, fd, offset, size, flags);
    begin();
    note(op, inode, offset, size, NULL, 0);
    end();
    result = syscall(call, fd, offset, size, flags);
    if (delay_us)
        usleep(rand_r(&delay_seed) % delay_us);          /* a disk takes its time; others write meanwhile */
    begin();
    if (!result)
        note(op + 1, inode, offset, size, NULL, 0);
    end();
    return result;
}

int fsync(int fd) { return two_records(OP_SYNC_BEGIN, fd, SYS_fsync, 0, 0, 0); }
int fdatasync(int fd) { return two_records(OP_SYNC_BEGIN, fd, SYS_fdatasync, 0, 0, 0); }
int sync_file_range(int fd, off_t offset, off_t size, unsigned int flags)
{
    if (flags != (SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) || offset || size)
        return syscall(SYS_sync_file_range, fd, offset, size, flags);    /* waits for nothing: promises nothing */
    return two_records(OP_PAGES_BEGIN, fd, SYS_sync_file_range, offset, size, flags);
}

/* -- mappings */

static void *map(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    void *mapped = (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
    uint64_t inode = fd >= 0 ? tracked(fd) : 0;
    int i;
    if (!inode || mapped == MAP_FAILED || !(flags & MAP_SHARED) || !(protection & PROT_WRITE))
        return mapped;
    begin();
    for (i = 0; i < MAPPINGS && mappings[i].at; i++)
        continue;
    if (i == MAPPINGS || offset)
        note(OP_OTHER, inode, 0, 0, "mmap", 4);
    else {
        mappings[i] = (struct mapping){mapped, malloc(length), length, inode};
        memcpy(mappings[i].shadow, mapped, length);
    }
    end();
    return mapped;
}

void *mmap(void *a, size_t n, int p, int f, int fd, off_t o) { return map(a, n, p, f, fd, o); }
void *mmap64(void *a, size_t n, int p, int f, int fd, off_t o) { return map(a, n, p, f, fd, o); }

int munmap(void *at, size_t length)
{
    int i;
    if (recording) {
        begin();
        for (i = 0; i < MAPPINGS; i++)
            if (mappings[i].at == at) {
                free(mappings[i].shadow);
                memset(&mappings[i], 0, sizeof mappings[i]);
            }
        end();
    }
    return syscall(SYS_munmap, at, length);
}

/* -- what file system it is, and what no one should call */

static int file_system(int fd, struct statfs *out)
{
    int result = syscall(SYS_fstatfs, fd, out);
    if (!result && tracked(fd) && pretended_type)
        out->f_type = pretended_type;
    return result;
}

int fstatfs(int fd, struct statfs *out) { return file_system(fd, out); }
int fstatfs64(int fd, struct statfs64 *out) { return file_system(fd, (struct statfs *)out); }

#define REFUSED(fd, name) do { \
    if (tracked(fd)) { \
        begin(); \
        note(OP_OTHER, 0, 0, 0, name, strlen(name)); \
        end(); \
    } \
} while (0)

ssize_t writev(int fd, const struct iovec *v, int n) { REFUSED(fd, "writev"); return syscall(SYS_writev, fd, v, n); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t offset)
{
    REFUSED(fd, "pwritev");
    return REAL(pwritev)(fd, v, n, offset);
}
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t offset, int flags)
{
    REFUSED(fd, "pwritev2");
    return REAL(pwritev2)(fd, v, n, offset, flags);
}
int msync(void *at, size_t length, int flags)
{
    if (recording) {
        begin();
        note(OP_OTHER, 0, 0, 0, "msync", 5);
        end();
    }
    return syscall(SYS_msync, at, length, flags);
}
