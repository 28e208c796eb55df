/* Asks the kernel for short time slices for the calling thread, so that it runs soon after it was woken, before threads
   that compute. What it may use in all stays the same. Linux 6.12 and later (sched_setattr(2): sched_runtime of a
   SCHED_OTHER thread); earlier ones take the call and change nothing. Nice value, policy and flags stay as they are. */
#ifndef PFVOL_TIMESLICE_H
#define PFVOL_TIMESLICE_H

#include <stdint.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PFVOL_SLICE_NS 100000 /* the shortest that the kernel grants */

struct pfvol_sched_attr { /* the first version of the kernel's struct sched_attr */
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;
    uint64_t deadline;
    uint64_t period;
};

/* 0, or -1 with errno set; there is nothing to do about it then. */
static inline int pfvol_short_slice(void) {
    struct pfvol_sched_attr attr = {0};
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) != 0)
        return -1;
    if (attr.policy != SCHED_OTHER)
        return 0;
    attr.size = sizeof attr;
    attr.runtime = PFVOL_SLICE_NS;
    return (int)syscall(SYS_sched_setattr, 0, &attr, 0);
}

#endif
