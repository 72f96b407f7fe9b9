/* The shared state of one emulated GPU host: the file behind DYNAMOLLM_NVML_STATE.
 *
 * Every process of that host maps this file, so all of them see the same GPUs: the NVML functions (nvml_*.c) read and
 * steer it as a driver would, the engine emulator and tests write load and faults through the emu_* functions
 * (state.py). This header is the only definition of the layout. A record changes between emu_begin and emu_commit only.
 *
 * How a GPU's record stays whole, whoever is killed whenever:
 *   - a robust, process-shared pthread mutex guards it: the kernel hands a killed holder's lock on. (fcntl locks would
 *     do that too, but belong to the process, not the thread, and cost two system calls each.)
 *   - there are two copies, and `current` names the valid one. A change is prepared in the other and published by one
 *     store, so a writer killed half-way leaves nothing to mend.
 *   - readers take the mutex as well (50 ns): power and energy must come from one instant, or the counter could step
 *     back.
 */
#ifndef DYNAMOLLM_HOST_STATE_H
#define DYNAMOLLM_HOST_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define EMU_MAGIC 0x31304c4d564e5944ULL /* "DYNVML01" as little-endian bytes */
#define EMU_LAYOUT_VERSION 2u
#define EMU_UNKNOWN_START UINT64_MAX
#define EMU_STATE_VARIABLE "DYNAMOLLM_NVML_STATE"

enum { EMU_MAX_GPUS = 16, EMU_MAX_PROCESSES = 16, EMU_MAX_IDLE_POINTS = 128 };

/* Of an H100 SXM: shutdown and slowdown lie 8 and 2 degrees above the highest operating temperature. */
enum {
    EMU_TEMPERATURE_GPU_MAX_C = 87,
    EMU_TEMPERATURE_SLOWDOWN_C = 89,
    EMU_TEMPERATURE_SHUTDOWN_C = 95,
    EMU_TEMPERATURE_MEMORY_MAX_C = 95,
};

/* Calls that a fault can name. Every NVML function on a device belongs to one of them. */
enum emu_calls {
    EMU_CALLS_HANDLE,      /* getting the device's handle, by whatever key */
    EMU_CALLS_IDENTITY,    /* what does not change: name, UUID, PCI, topology, ranges */
    EMU_CALLS_TELEMETRY,   /* power, clocks, temperature, utilisation, event reasons, modes */
    EMU_CALLS_ENERGY,      /* the energy counter */
    EMU_CALLS_MEMORY,      /* memory in use */
    EMU_CALLS_PROCESSES,   /* process lists */
    EMU_CALLS_CLOCK_WRITE, /* lock and reset clocks */
    EMU_CALLS_POWER_WRITE, /* set the power limit */
    EMU_CALLS_MODE_WRITE,  /* persistence mode and the like */
    EMU_CALLS_COUNT
};

/* What a GPU model is; the same for every GPU of a host. Written once, at creation. */
struct emu_board {
    char name[96];
    uint64_t memory_bytes;
    uint64_t memory_reserved_bytes; /* held by the driver; counted as used */
    uint32_t clock_min_mhz;
    uint32_t clock_max_mhz;
    uint32_t clock_step_mhz;
    uint32_t clock_bare_mhz; /* SM clock while no process has a context */
    uint32_t memory_clock_mhz;
    uint32_t memory_clock_low_mhz; /* the other supported memory clock */
    uint32_t power_limit_min_mw;
    uint32_t power_limit_max_mw;
    uint32_t power_limit_default_mw;
    uint32_t power_bare_mw;                 /* power while no process has a context */
    uint32_t idle_points;                   /* length of idle_mhz and idle_mw, at least 1 */
    uint32_t idle_mhz[EMU_MAX_IDLE_POINTS]; /* rising; linear between, flat beyond */
    uint32_t idle_mw[EMU_MAX_IDLE_POINTS];  /* power with a context and no work, at that SM clock */
    uint32_t padding;
};

/* Who a GPU is. Written once, at creation. */
struct emu_identity {
    char uuid[48];
    char serial[32];
    uint32_t pci_domain;
    uint32_t pci_bus;
    uint32_t numa_node;
    uint32_t padding;
};

struct emu_config {
    uint32_t gpu_count;
    uint32_t padding;
    char driver_version[80];
    struct emu_board board;
    struct emu_identity gpus[EMU_MAX_GPUS];
};

/* A process that holds a context, with the work it does now. pid 0: free slot. */
struct emu_process {
    int32_t pid;
    uint32_t power_mw;  /* of the GPU while this process keeps it busy; 0: no work */
    uint32_t gpu_util;  /* percent */
    uint32_t mem_util;  /* percent */
    uint32_t clock_mhz; /* SM clock that the power limit leaves to this work; 0: not limited */
    uint32_t padding;
    uint64_t started_ticks; /* start time from /proc, so that a recycled pid is not taken for this process */
    uint64_t namespace_id;  /* pid namespace it was named in; only callers in the same one judge whether it lives */
    uint64_t used_bytes;
};

struct emu_fault {
    int32_t code; /* NVML error to return; 0: none */
    uint32_t padding;
    int64_t hang_until_ns; /* CLOCK_MONOTONIC; 0: no hang, INT64_MAX: until cleared */
    int64_t delay_ns;      /* time each call takes */
};

/* All that changes about a GPU. */
struct emu_record {
    uint64_t energy_nj; /* counter at since_ns; from then on power accrues */
    int64_t since_ns;
    uint32_t lock_min_mhz; /* 0: not locked */
    uint32_t lock_max_mhz;
    uint32_t memory_lock_mhz; /* 0: not locked */
    uint32_t power_limit_mw;
    uint32_t persistence;
    uint32_t mig;
    uint32_t compute_mode;
    uint32_t padding;
    struct emu_process processes[EMU_MAX_PROCESSES];
    struct emu_process injected; /* load that belongs to no process (tests) */
    struct emu_fault faults[EMU_CALLS_COUNT];
};

struct emu_gpu {
    pthread_mutex_t mutex;
    _Atomic uint32_t current; /* index of the valid record */
    uint32_t padding;
    int64_t alive_ns; /* last time every process with a context was seen alive */
    struct emu_record record[2];
};

struct emu_host {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t padding;
    uint64_t layout_size;
    char boot_id[40]; /* monotonic times and lock owners mean nothing after a reboot */
    int64_t created_ns;
    /* Rises by one when the driver is unloaded and by one when it is loaded: odd means that there is none. Clients that
     * initialised before lose every GPU until they start the library again. */
    _Atomic uint64_t driver_epoch;
    uint32_t order[EMU_MAX_GPUS]; /* which GPU stands at an index; changes only while the driver is unloaded */
    pthread_mutex_t driver; /* held for the delay of a write call: a real driver serialises them over all GPUs */
    struct emu_config config;
    struct emu_gpu gpus[EMU_MAX_GPUS];
};

/* What a GPU shows at one instant: every derived figure is computed here and nowhere else. */
struct emu_view {
    int64_t at_ns;
    uint64_t energy_nj;
    uint64_t used_bytes; /* by processes; without the driver's reserve */
    uint32_t power_mw;
    uint32_t clock_mhz;
    uint32_t memory_clock_mhz;
    uint32_t lock_min_mhz; /* 0: not locked */
    uint32_t lock_max_mhz;
    uint32_t power_limit_mw;
    uint32_t gpu_util;
    uint32_t mem_util;
    uint32_t temperature_c;
    uint32_t memory_temperature_c;
    uint32_t idle;         /* 1: no work now */
    uint32_t power_capped; /* 1: the power limit holds clock or power down */
    uint32_t persistence;
    uint32_t mig;
    uint32_t compute_mode;
    uint32_t process_count;
    struct emu_process processes[EMU_MAX_PROCESSES];
};

/* --- host_state.c, for the other C files --- */

/* Changes one GPU's record: emu_begin locks, accrues energy until now and hands out the copy to change, emu_commit
 * publishes it. Nothing that can block may stand between the two. `fresh` as in emu_observe. */
struct emu_record *emu_begin(struct emu_host *host, unsigned index, int fresh);
void emu_commit(struct emu_host *host, unsigned index);
void emu_read(struct emu_host *host, unsigned index, struct emu_record *copy);
/* The NVML index that a GPU has now. */
unsigned emu_position(const struct emu_host *host, unsigned gpu);
/* Waits out a hang and the delay of a call and returns the NVML error that is injected for it, or 0. */
int emu_suffer(struct emu_host *host, unsigned index, enum emu_calls calls);
void emu_lock_mutex(pthread_mutex_t *mutex);
/* Start time of a process in ticks since boot; 0 if it is gone, EMU_UNKNOWN_START if /proc cannot be read. */
uint64_t emu_process_started(int32_t pid);
uint64_t emu_own_namespace(void);
/* The slot of a process, or NULL; pid 0 finds a free slot. */
struct emu_process *emu_find_process(struct emu_record *record, int32_t pid);

/* --- exported, for state.py: 0 or a negated errno --- */

#define EMU_EXPORT __attribute__((visibility("default")))

/* -EPROTO: the caller was written for another layout. */
EMU_EXPORT int emu_check_layout(uint32_t version, size_t config_size, size_t view_size, size_t fault_size);
EMU_EXPORT int64_t emu_now_ns(void);
/* Writes a new state file at `path`, atomically, in place of an older one. */
EMU_EXPORT int emu_create(const char *path, const struct emu_config *config);
/* -ENOENT: no file; -EPROTO: not a state file of this layout; -ESTALE: from before the last boot. */
EMU_EXPORT int emu_open(const char *path, struct emu_host **host);
EMU_EXPORT int emu_close(struct emu_host *host);
EMU_EXPORT void emu_describe(const struct emu_host *host, struct emu_config *config);
/* `fresh`: look for dead processes now, not only when the last look is some milliseconds old. */
EMU_EXPORT int emu_observe(struct emu_host *host, unsigned index, int fresh, struct emu_view *view);
/* Locked range as min << 32 | max, or 0. */
EMU_EXPORT uint64_t emu_lock(struct emu_host *host, unsigned index);
/* Highest SM clock that the lock leaves. */
EMU_EXPORT uint32_t emu_clock_ceiling(struct emu_host *host, unsigned index);
EMU_EXPORT uint32_t emu_power_limit(struct emu_host *host, unsigned index);
/* -ENOMEM: does not fit; -ENOSPC: no free slot; -ESRCH: no such process. */
EMU_EXPORT int emu_attach(struct emu_host *host, unsigned index, int32_t pid, uint64_t used_bytes);
EMU_EXPORT int emu_detach(struct emu_host *host, unsigned index, int32_t pid);
/* pid 0: load that belongs to no process. -ESRCH: that process holds no context here. */
EMU_EXPORT int emu_set_activity(struct emu_host *host, unsigned index, int32_t pid, uint32_t power_mw,
                                uint32_t gpu_util, uint32_t mem_util, uint32_t clock_mhz);
/* Replaces the fault of each group whose bit is set in `calls`. */
EMU_EXPORT int emu_set_fault(struct emu_host *host, unsigned index, uint32_t calls, const struct emu_fault *fault);
EMU_EXPORT int emu_reset_energy(struct emu_host *host, unsigned index);
/* Unloads the driver; nothing happens if there is none. */
EMU_EXPORT int emu_unload_driver(struct emu_host *host);
/* Loads it: settings and energy counters start anew, GPUs stand in the given order. -EBUSY: it is loaded. */
EMU_EXPORT int emu_load_driver(struct emu_host *host, const uint32_t *order);
EMU_EXPORT int emu_set_mig(struct emu_host *host, unsigned index, uint32_t enabled);

#endif
