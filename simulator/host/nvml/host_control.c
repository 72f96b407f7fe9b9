/* What engines and tests do to a GPU, called from state.py: contexts, load, faults. */
#include "host_state.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

uint64_t emu_lock(struct emu_host *host, unsigned index) {
    struct emu_record record;
    if (index >= host->config.gpu_count)
        return 0;
    emu_read(host, index, &record);
    return (uint64_t)record.lock_min_mhz << 32 | record.lock_max_mhz;
}

uint32_t emu_clock_ceiling(struct emu_host *host, unsigned index) {
    uint32_t max_mhz = (uint32_t)emu_lock(host, index);
    return max_mhz != 0 ? max_mhz : host->config.board.clock_max_mhz;
}

uint32_t emu_power_limit(struct emu_host *host, unsigned index) {
    struct emu_record record;
    if (index >= host->config.gpu_count)
        return 0;
    emu_read(host, index, &record);
    return record.power_limit_mw;
}

int emu_attach(struct emu_host *host, unsigned index, int32_t pid, uint64_t used_bytes) {
    if (index >= host->config.gpu_count || pid <= 0)
        return -EINVAL;
    uint64_t started_ticks = emu_process_started(pid);
    if (started_ticks == 0 || started_ticks == EMU_UNKNOWN_START)
        return -ESRCH;
    const struct emu_board *board = &host->config.board;
    struct emu_record *record = emu_begin(host, index, 1);
    struct emu_process *process = emu_find_process(record, pid);
    uint64_t others_bytes = board->memory_reserved_bytes;
    for (int slot = 0; slot < EMU_MAX_PROCESSES; slot++)
        if (&record->processes[slot] != process)
            others_bytes += record->processes[slot].used_bytes;
    if (process == NULL)
        process = emu_find_process(record, 0);
    int error = process == NULL ? -ENOSPC : used_bytes > board->memory_bytes - others_bytes ? -ENOMEM : 0;
    if (error == 0) {
        process->pid = pid;
        process->started_ticks = started_ticks;
        process->namespace_id = emu_own_namespace();
        process->used_bytes = used_bytes;
    }
    emu_commit(host, index);
    return error;
}

int emu_detach(struct emu_host *host, unsigned index, int32_t pid) {
    if (index >= host->config.gpu_count || pid <= 0)
        return -EINVAL;
    struct emu_record *record = emu_begin(host, index, 0);
    struct emu_process *process = emu_find_process(record, pid);
    if (process != NULL)
        memset(process, 0, sizeof *process);
    emu_commit(host, index);
    return process != NULL ? 0 : -ESRCH;
}

int emu_set_activity(struct emu_host *host, unsigned index, int32_t pid, uint32_t power_mw, uint32_t gpu_util,
                     uint32_t mem_util, uint32_t clock_mhz) {
    if (index >= host->config.gpu_count || pid < 0 || gpu_util > 100 || mem_util > 100)
        return -EINVAL;
    struct emu_record *record = emu_begin(host, index, 0);
    struct emu_process *process = pid == 0 ? &record->injected : emu_find_process(record, pid);
    if (process != NULL) {
        process->power_mw = power_mw;
        process->gpu_util = gpu_util;
        process->mem_util = mem_util;
        process->clock_mhz = clock_mhz;
    }
    emu_commit(host, index);
    return process != NULL ? 0 : -ESRCH;
}

int emu_set_fault(struct emu_host *host, unsigned index, uint32_t calls, const struct emu_fault *fault) {
    if (index >= host->config.gpu_count || calls >> EMU_CALLS_COUNT != 0)
        return -EINVAL;
    struct emu_record *record = emu_begin(host, index, 0);
    for (int group = 0; group < EMU_CALLS_COUNT; group++)
        if (calls >> group & 1)
            record->faults[group] = *fault;
    emu_commit(host, index);
    return 0;
}

int emu_reset_energy(struct emu_host *host, unsigned index) {
    if (index >= host->config.gpu_count)
        return -EINVAL;
    emu_begin(host, index, 0)->energy_nj = 0;
    emu_commit(host, index);
    return 0;
}

unsigned emu_position(const struct emu_host *host, unsigned gpu) {
    unsigned position = 0;
    while (position < host->config.gpu_count && host->order[position] != gpu)
        position++;
    return position;
}

int emu_unload_driver(struct emu_host *host) {
    if (atomic_load(&host->driver_epoch) % 2 == 0)
        atomic_fetch_add(&host->driver_epoch, 1);
    return 0;
}

int emu_load_driver(struct emu_host *host, const uint32_t *order) {
    uint32_t seen = 0;
    if (atomic_load(&host->driver_epoch) % 2 == 0)
        return -EBUSY;
    for (unsigned index = 0; index < host->config.gpu_count; index++) {
        if (order[index] >= host->config.gpu_count || seen >> order[index] & 1)
            return -EINVAL;
        seen |= 1u << order[index];
    }
    memcpy(host->order, order, host->config.gpu_count * sizeof *order);
    for (unsigned index = 0; index < host->config.gpu_count; index++) {
        struct emu_record *record = emu_begin(host, index, 1);
        record->energy_nj = 0;
        record->lock_min_mhz = record->lock_max_mhz = record->memory_lock_mhz = 0;
        record->power_limit_mw = host->config.board.power_limit_default_mw;
        emu_commit(host, index);
    }
    atomic_fetch_add(&host->driver_epoch, 1);
    return 0;
}

int emu_set_mig(struct emu_host *host, unsigned index, uint32_t enabled) {
    if (index >= host->config.gpu_count)
        return -EINVAL;
    emu_begin(host, index, 0)->mig = enabled != 0;
    emu_commit(host, index);
    return 0;
}
