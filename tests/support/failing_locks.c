/* Loaded before a program: no lock on a file is given while the file of the variable FAILING_LOCKS is there, as on NFS
   whose lock service is gone. Its name is that of the error, ENOLCK or EIO. */
#define fcntl declared_fcntl
#define fcntl64 declared_fcntl64
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>
#undef fcntl
#undef fcntl64

static int fails(int unlocks) {
    const char *file = getenv("FAILING_LOCKS");
    if (unlocks || file == NULL || access(file, F_OK) != 0) return 0;
    errno = strstr(file, "ENOLCK") ? ENOLCK : EIO;
    return 1;
}

int flock(int descriptor, int how) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return fails(how & LOCK_UN) ? -1 : real(descriptor, how);
}

static int control(const char *name, int descriptor, int command, void *argument) {
    int (*real)(int, int, void *) = dlsym(RTLD_NEXT, name);
    int locks = command == F_SETLK || command == F_SETLKW;
    return locks && fails(((struct flock *)argument)->l_type == F_UNLCK) ? -1 : real(descriptor, command, argument);
}

int fcntl(int descriptor, int command, void *argument) { return control("fcntl", descriptor, command, argument); }

int fcntl64(int descriptor, int command, void *argument) { return control("fcntl64", descriptor, command, argument); }
