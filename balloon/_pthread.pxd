# What is used of the threads of the C library. A mutex is waited for without the GIL, and with a time-out.

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t *mask)
    int sigdelset(sigset_t *mask, int number)
    int pthread_sigmask(int how, const sigset_t *mask, sigset_t *old)
    int SIG_SETMASK, SIGBUS, SIGSEGV, SIGFPE, SIGILL

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    ctypedef unsigned long pthread_t
    int PTHREAD_CREATE_DETACHED
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_setdetachstate(pthread_attr_t *attributes, int state)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    int pthread_create(pthread_t *made, const pthread_attr_t *attributes,
                       void *(*run)(void *) noexcept nogil, void *argument)
    pthread_t pthread_self()
    int pthread_setname_np(pthread_t which, const char *name)
    int pthread_getcpuclockid(pthread_t which, int *clock)
