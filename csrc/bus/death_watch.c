/* A worker must not outlive its driver, whatever its Python is doing: a thread that needs no GIL sees to it. */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

enum { PARENT, LIFELINE, NUM_WATCHED };

static int watched[NUM_WATCHED]; /* owned by the thread, for the life of the process */

static void *watch(void *unused)
{
    (void)unused;
    /* No events asked for on the pipe: hang-up is always reported, and bytes that someone writes do not matter. */
    struct pollfd polled[NUM_WATCHED] = {
        [PARENT] = {.fd = watched[PARENT], .events = POLLIN},
        [LIFELINE] = {.fd = watched[LIFELINE], .events = 0},
    };
    while (poll(polled, NUM_WATCHED, -1) < 0 && errno == EINTR)
        ;
    /* The parent exited, its end of the pipe is gone, or the watch is impossible: all three end this process. */
    _exit(1);
}

static enum bus_result refuse(struct bus_why *why, const char *what, int error)
{
    snprintf(why->text, sizeof why->text, "cannot arm the death watch: %s: %s", what, strerror(error));
    for (int i = 0; i < NUM_WATCHED; i++)
        if (watched[i] >= 0)
            close(watched[i]);
    return BUS_FAILED;
}

/* End this process when process `parent_pid`, its parent, has exited or the write end of the pipe `lifeline_fd` has
 * been closed by all that hold it. Ends it at once if the parent is gone already. Arm once per process.
 *
 * Both are watched because each has a hole: a fork of the parent keeps its end of the pipe open, and a parent that lives
 * on may have given up its engine without a word. PR_SET_PDEATHSIG would fire when the parent's thread ends. */
enum bus_result bus_arm_death_watch(int parent_pid, int lifeline_fd, struct bus_why *why)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;

    watched[PARENT] = watched[LIFELINE] = -1;
    watched[PARENT] = (int)syscall(SYS_pidfd_open, parent_pid, 0);
    if (watched[PARENT] < 0 && errno != ESRCH)
        return refuse(why, "pidfd_open", errno);
    /* Asked after opening: had the parent died and its pid been reused before, we would have another parent now. */
    if (watched[PARENT] < 0 || getppid() != parent_pid)
        _exit(1);
    watched[LIFELINE] = fcntl(lifeline_fd, F_DUPFD_CLOEXEC, 0);
    if (watched[LIFELINE] < 0)
        return refuse(why, "the lifeline's file descriptor", errno);

    int error = pthread_attr_init(&attributes);
    if (error != 0)
        return refuse(why, "pthread_attr_init", error);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, &attributes, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error == 0 ? BUS_OK : refuse(why, "pthread_create", error);
}
