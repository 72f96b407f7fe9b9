/* The emulated GPUs themselves: changing a record whole, and the laws by which power, clock and energy follow from it.
 * NVML functions and state.py both stand on this file; see host_state.h for the layout. */
#include "host_state.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define ALIVE_CHECK_NS 20000000LL /* processes are looked up in /proc at most this often */
#define HANG_POLL_NS 2000000LL

int64_t emu_now_ns(void) {
    struct timespec now;
    /* Not BOOTTIME: a suspended machine burns no energy. */
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000LL + now.tv_nsec;
}

void emu_lock_mutex(pthread_mutex_t *mutex) {
    if (pthread_mutex_lock(mutex) == EOWNERDEAD)
        /* Its holder was killed. Nothing to mend: what it prepared was never published. */
        pthread_mutex_consistent(mutex);
}

/* --- processes --- */

uint64_t emu_own_namespace(void) {
    struct stat status;
    return stat("/proc/self/ns/pid", &status) == 0 ? (uint64_t)status.st_ino : 0;
}

/* A zombie is gone: its contexts closed when it died. */
uint64_t emu_process_started(int32_t pid) {
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) /* /proc may also hide other users' processes (hidepid, ProtectProc=) */
        return errno == ENOENT && kill(pid, 0) != 0 && errno == ESRCH ? 0 : EMU_UNKNOWN_START;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0)
        return 0;
    text[length] = '\0';
    const char *field = strrchr(text, ')'); /* the name before it may hold spaces */
    if (field == NULL || field[1] == '\0' || field[2] == 'Z' || field[2] == 'X')
        return 0;
    for (int skip = 0; skip < 20 && field != NULL; skip++)
        field = strchr(field + 1, ' ');
    return field == NULL ? 0 : strtoull(field + 1, NULL, 10);
}

static int process_lives(const struct emu_process *process, uint64_t namespace_id) {
    if (process->namespace_id != namespace_id)
        return 1;
    uint64_t started = emu_process_started(process->pid);
    return started == process->started_ticks || started == EMU_UNKNOWN_START;
}

struct emu_process *emu_find_process(struct emu_record *record, int32_t pid) {
    for (int slot = 0; slot < EMU_MAX_PROCESSES; slot++)
        if (record->processes[slot].pid == pid)
            return &record->processes[slot];
    return NULL;
}

/* --- the laws --- */

static uint32_t idle_power_mw(const struct emu_board *board, uint32_t clock_mhz) {
    const uint32_t *mhz = board->idle_mhz, *mw = board->idle_mw;
    uint32_t last = board->idle_points - 1;
    if (clock_mhz <= mhz[0])
        return mw[0];
    for (uint32_t point = 1; point <= last; point++)
        if (clock_mhz <= mhz[point]) {
            double share = (double)(clock_mhz - mhz[point - 1]) / (mhz[point] - mhz[point - 1]);
            return (uint32_t)(mw[point - 1] + share * ((double)mw[point] - mw[point - 1]) + 0.5);
        }
    return mw[last];
}

static uint32_t clock_ceiling_mhz(const struct emu_board *board, const struct emu_record *record) {
    return record->lock_max_mhz != 0 ? record->lock_max_mhz : board->clock_max_mhz;
}

/* Everything of a view but time and energy. Where several processes share a GPU the one that draws most counts: engines
 * on a shared GPU take turns (one serves, the others sleep). */
static void derive(const struct emu_board *board, const struct emu_record *record, struct emu_view *view) {
    uint32_t wanted_mw = 0, limited_mhz = UINT32_MAX;
    view->gpu_util = view->mem_util = view->process_count = 0;
    view->used_bytes = 0;
    for (int slot = 0; slot <= EMU_MAX_PROCESSES; slot++) {
        const struct emu_process *process = slot < EMU_MAX_PROCESSES ? &record->processes[slot] : &record->injected;
        if (process->pid != 0) {
            view->processes[view->process_count++] = *process;
            view->used_bytes += process->used_bytes;
        }
        if (process->power_mw > wanted_mw)
            wanted_mw = process->power_mw;
        if (process->gpu_util > view->gpu_util)
            view->gpu_util = process->gpu_util;
        if (process->mem_util > view->mem_util)
            view->mem_util = process->mem_util;
        if (process->power_mw != 0 && process->clock_mhz != 0 && process->clock_mhz < limited_mhz)
            limited_mhz = process->clock_mhz;
    }
    uint32_t ceiling_mhz = clock_ceiling_mhz(board, record);
    view->idle = wanted_mw == 0;
    view->power_capped = 0;
    if (!view->idle) {
        view->power_capped = wanted_mw > record->power_limit_mw || limited_mhz < ceiling_mhz;
        view->power_mw = wanted_mw < record->power_limit_mw ? wanted_mw : record->power_limit_mw;
        view->clock_mhz = limited_mhz < ceiling_mhz ? limited_mhz : ceiling_mhz;
    } else if (view->process_count != 0) {
        view->clock_mhz = ceiling_mhz;
        view->power_mw = idle_power_mw(board, ceiling_mhz);
    } else {
        /* Without a context the chip falls to its own low clock, but a lock holds its minimum even then. */
        view->clock_mhz = board->clock_bare_mhz < ceiling_mhz ? board->clock_bare_mhz : ceiling_mhz;
        if (view->clock_mhz < record->lock_min_mhz)
            view->clock_mhz = record->lock_min_mhz;
        view->power_mw = board->power_bare_mw;
    }
    view->memory_clock_mhz = record->memory_lock_mhz != 0 ? record->memory_lock_mhz : board->memory_clock_mhz;
    view->lock_min_mhz = record->lock_min_mhz;
    view->lock_max_mhz = record->lock_max_mhz;
    view->power_limit_mw = record->power_limit_mw;
    view->persistence = record->persistence;
    view->mig = record->mig;
    view->compute_mode = record->compute_mode;
    /* A straight line through what an H100 shows idle (about 30 C) and at 700 W (about 62 C); it follows at once. */
    view->temperature_c = 26 + view->power_mw * 52 / 1000000;
    view->memory_temperature_c = 32 + view->power_mw * 57 / 1000000;
}

static uint64_t energy_at(const struct emu_record *record, uint32_t power_mw, int64_t now_ns) {
    int64_t elapsed_ns = now_ns > record->since_ns ? now_ns - record->since_ns : 0;
    return record->energy_nj + (uint64_t)((double)power_mw * (double)elapsed_ns / 1000.0); /* mW x us = nJ */
}

static void accrue(const struct emu_board *board, struct emu_record *record, int64_t now_ns) {
    struct emu_view view;
    if (now_ns <= record->since_ns)
        return;
    derive(board, record, &view);
    record->energy_nj = energy_at(record, view.power_mw, now_ns);
    record->since_ns = now_ns;
}

/* --- records (all with the GPU's mutex held) --- */

static const struct emu_record *current(const struct emu_gpu *gpu) {
    return &gpu->record[atomic_load_explicit(&gpu->current, memory_order_acquire)];
}

static struct emu_record *prepare(struct emu_gpu *gpu) {
    struct emu_record *next = &gpu->record[1 - atomic_load_explicit(&gpu->current, memory_order_acquire)];
    memcpy(next, current(gpu), sizeof *next);
    return next;
}

static void publish(struct emu_gpu *gpu) {
    uint32_t next = 1 - atomic_load_explicit(&gpu->current, memory_order_relaxed);
    atomic_store_explicit(&gpu->current, next, memory_order_release);
}

/* Removes processes that have died. Their power is charged up to the last instant at which it could have been shown, so
 * that the counter never steps back and a GPU that nobody watched is not charged for an engine long gone. */
static void drop_the_dead(const struct emu_board *board, struct emu_gpu *gpu, int64_t now_ns, int fresh) {
    int64_t shown_ns = gpu->alive_ns + ALIVE_CHECK_NS;
    if (!fresh && now_ns < shown_ns)
        return;
    uint64_t namespace_id = emu_own_namespace();
    struct emu_record *record = NULL;
    for (int slot = 0; slot < EMU_MAX_PROCESSES; slot++) {
        const struct emu_process *process = &current(gpu)->processes[slot];
        if (process->pid == 0 || process_lives(process, namespace_id))
            continue;
        if (record == NULL) {
            record = prepare(gpu);
            accrue(board, record, shown_ns < now_ns ? shown_ns : now_ns);
        }
        memset(&record->processes[slot], 0, sizeof record->processes[slot]);
    }
    if (record != NULL)
        publish(gpu);
    gpu->alive_ns = now_ns;
}

struct emu_record *emu_begin(struct emu_host *host, unsigned index, int fresh) {
    struct emu_gpu *gpu = &host->gpus[index];
    emu_lock_mutex(&gpu->mutex);
    int64_t now_ns = emu_now_ns();
    drop_the_dead(&host->config.board, gpu, now_ns, fresh);
    struct emu_record *record = prepare(gpu);
    accrue(&host->config.board, record, now_ns);
    return record;
}

void emu_commit(struct emu_host *host, unsigned index) {
    publish(&host->gpus[index]);
    pthread_mutex_unlock(&host->gpus[index].mutex);
}

void emu_read(struct emu_host *host, unsigned index, struct emu_record *copy) {
    emu_lock_mutex(&host->gpus[index].mutex);
    *copy = *current(&host->gpus[index]);
    pthread_mutex_unlock(&host->gpus[index].mutex);
}

int emu_observe(struct emu_host *host, unsigned index, int fresh, struct emu_view *view) {
    if (index >= host->config.gpu_count)
        return -EINVAL;
    const struct emu_board *board = &host->config.board;
    struct emu_gpu *gpu = &host->gpus[index];
    emu_lock_mutex(&gpu->mutex);
    view->at_ns = emu_now_ns();
    drop_the_dead(board, gpu, view->at_ns, fresh);
    derive(board, current(gpu), view);
    view->energy_nj = energy_at(current(gpu), view->power_mw, view->at_ns);
    pthread_mutex_unlock(&gpu->mutex);
    return 0;
}

/* --- faults --- */

static void sleep_ns(int64_t duration_ns) {
    struct timespec rest = {.tv_sec = duration_ns / 1000000000LL, .tv_nsec = duration_ns % 1000000000LL};
    while (nanosleep(&rest, &rest) != 0 && errno == EINTR)
        ;
}

int emu_suffer(struct emu_host *host, unsigned index, enum emu_calls calls) {
    struct emu_record record;
    emu_read(host, index, &record);
    while (record.faults[calls].hang_until_ns > emu_now_ns()) {
        sleep_ns(HANG_POLL_NS);
        emu_read(host, index, &record);
    }
    if (record.faults[calls].delay_ns > 0) {
        int serialised = calls == EMU_CALLS_CLOCK_WRITE || calls == EMU_CALLS_POWER_WRITE;
        if (serialised)
            emu_lock_mutex(&host->driver);
        sleep_ns(record.faults[calls].delay_ns);
        if (serialised)
            pthread_mutex_unlock(&host->driver);
    }
    return record.faults[calls].code;
}
