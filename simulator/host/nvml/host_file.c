/* The state file: made whole and then renamed into place, checked when it is mapped. */
#include "host_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void read_boot_id(char boot_id[40]) {
    memset(boot_id, 0, 40);
    int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    if (read(file, boot_id, 36) != 36)
        memset(boot_id, 0, 40);
    close(file);
}

static int make_mutex(pthread_mutex_t *mutex) {
    pthread_mutexattr_t kind;
    int error = pthread_mutexattr_init(&kind);
    if (error == 0)
        error = pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    if (error == 0)
        error = pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    if (error == 0)
        error = pthread_mutex_init(mutex, &kind);
    pthread_mutexattr_destroy(&kind);
    return -error;
}

static int fill(struct emu_host *host, const struct emu_config *config) {
    int64_t now_ns = emu_now_ns();
    host->layout_version = EMU_LAYOUT_VERSION;
    host->layout_size = sizeof *host;
    host->created_ns = now_ns;
    host->config = *config;
    read_boot_id(host->boot_id);
    int error = make_mutex(&host->driver);
    for (unsigned index = 0; index < config->gpu_count && error == 0; index++) {
        struct emu_gpu *gpu = &host->gpus[index];
        error = make_mutex(&gpu->mutex);
        host->order[index] = index;
        gpu->alive_ns = now_ns;
        gpu->record[0].since_ns = now_ns;
        gpu->record[0].power_limit_mw = config->board.power_limit_default_mw;
        gpu->record[0].persistence = 1;
    }
    host->magic = EMU_MAGIC;
    return error;
}

int emu_create(const char *path, const struct emu_config *config) {
    char temporary[4096];
    if (config->gpu_count < 1 || config->gpu_count > EMU_MAX_GPUS || config->board.idle_points < 1 ||
        config->board.idle_points > EMU_MAX_IDLE_POINTS || config->board.clock_step_mhz == 0)
        return -EINVAL;
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.new.%d", path, (int)getpid()) >= sizeof temporary)
        return -ENAMETOOLONG;
    int file = open(temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file < 0)
        return -errno;
    /* Like /dev/nvidia*: open to every user of the host, whatever the umask; agent and engines may run as two users. */
    int error = fchmod(file, 0666) != 0 || ftruncate(file, sizeof(struct emu_host)) != 0 ? -errno : 0;
    if (error == 0) {
        struct emu_host *host = mmap(NULL, sizeof *host, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        error = host == MAP_FAILED ? -errno : fill(host, config);
        if (host != MAP_FAILED)
            munmap(host, sizeof *host);
    }
    close(file);
    if (error == 0 && rename(temporary, path) != 0)
        error = -errno;
    if (error != 0)
        unlink(temporary);
    return error;
}

int emu_open(const char *path, struct emu_host **opened) {
    struct stat status;
    char boot_id[40];
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return -errno;
    if (fstat(file, &status) != 0 || status.st_size != (off_t)sizeof(struct emu_host)) {
        close(file);
        return -EPROTO;
    }
    struct emu_host *host = mmap(NULL, sizeof *host, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    int error = host == MAP_FAILED ? -errno : 0;
    close(file);
    if (error != 0)
        return error;
    read_boot_id(boot_id);
    if (host->magic != EMU_MAGIC || host->layout_version != EMU_LAYOUT_VERSION || host->layout_size != sizeof *host)
        error = -EPROTO;
    else if (memcmp(host->boot_id, boot_id, sizeof boot_id) != 0)
        error = -ESTALE;
    if (error != 0) {
        munmap(host, sizeof *host);
        return error;
    }
    *opened = host;
    return 0;
}

int emu_close(struct emu_host *host) { return munmap(host, sizeof *host) == 0 ? 0 : -errno; }

void emu_describe(const struct emu_host *host, struct emu_config *config) { *config = host->config; }

int emu_check_layout(uint32_t version, size_t config_size, size_t view_size, size_t fault_size) {
    int same = version == EMU_LAYOUT_VERSION && config_size == sizeof(struct emu_config) &&
               view_size == sizeof(struct emu_view) && fault_size == sizeof(struct emu_fault);
    return same ? 0 : -EPROTO;
}
