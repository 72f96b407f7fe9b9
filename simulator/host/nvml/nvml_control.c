/* NVML: what a client with the permission changes. There is no getter for locked clocks, as in the real library. */
#include "nvml_surface.h"

/* --- SM clock --- */

static nvmlReturn_t lock_clocks(nvmlDevice_t device, unsigned least_mhz, unsigned most_mhz) {
    ENTER(device, EMU_CALLS_CLOCK_WRITE);
    struct emu_record *record = emu_begin(host, index, 0);
    record->lock_min_mhz = least_mhz;
    record->lock_max_mhz = most_mhz;
    emu_commit(host, index);
    return NVML_SUCCESS;
}

/* The grid step at or below a clock: a lock never allows more than was asked for, but at least the lowest step. */
static unsigned snap(const struct emu_board *board, unsigned clock_mhz) {
    if (clock_mhz <= board->clock_min_mhz)
        return board->clock_min_mhz;
    if (clock_mhz >= board->clock_max_mhz)
        return board->clock_max_mhz;
    return clock_mhz - (clock_mhz - board->clock_min_mhz) % board->clock_step_mhz;
}

nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned int least_mhz, unsigned int most_mhz) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    const struct emu_board *board = &host->config.board;
    int least_named = least_mhz >= NVML_CLOCK_LIMIT_ID_RANGE_START,
        most_named = most_mhz >= NVML_CLOCK_LIMIT_ID_RANGE_START;
    REQUIRE(least_named == most_named);
    if (least_named) {
        REQUIRE(least_mhz == NVML_CLOCK_LIMIT_ID_TDP || least_mhz == NVML_CLOCK_LIMIT_ID_UNLIMITED);
        REQUIRE(most_mhz == NVML_CLOCK_LIMIT_ID_TDP || most_mhz == NVML_CLOCK_LIMIT_ID_UNLIMITED);
        if (least_mhz == NVML_CLOCK_LIMIT_ID_UNLIMITED && most_mhz == NVML_CLOCK_LIMIT_ID_UNLIMITED)
            return lock_clocks(device, 0, 0);
        /* This board's TDP clock is its highest. */
        least_mhz = least_mhz == NVML_CLOCK_LIMIT_ID_TDP ? board->clock_max_mhz : board->clock_min_mhz;
        most_mhz = board->clock_max_mhz;
    }
    REQUIRE(least_mhz <= most_mhz && least_mhz <= board->clock_max_mhz && most_mhz >= board->clock_min_mhz);
    return lock_clocks(device, snap(board, least_mhz), snap(board, most_mhz));
}

nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device) { return lock_clocks(device, 0, 0); }

/* --- memory clock --- */

static nvmlReturn_t lock_memory_clock(nvmlDevice_t device, unsigned clock_mhz) {
    ENTER(device, EMU_CALLS_CLOCK_WRITE);
    emu_begin(host, index, 0)->memory_lock_mhz = clock_mhz;
    emu_commit(host, index);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceSetMemoryLockedClocks(nvmlDevice_t device, unsigned int least_mhz, unsigned int most_mhz) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    const struct emu_board *board = &host->config.board;
    REQUIRE(least_mhz <= most_mhz && least_mhz <= board->memory_clock_mhz && most_mhz >= board->memory_clock_low_mhz);
    return lock_memory_clock(device, most_mhz >= board->memory_clock_mhz ? board->memory_clock_mhz
                                                                         : board->memory_clock_low_mhz);
}

nvmlReturn_t nvmlDeviceResetMemoryLockedClocks(nvmlDevice_t device) { return lock_memory_clock(device, 0); }

/* --- power limit --- */

nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned int limit_mw) {
    ENTER(device, EMU_CALLS_POWER_WRITE);
    REQUIRE(limit_mw >= host->config.board.power_limit_min_mw && limit_mw <= host->config.board.power_limit_max_mw);
    emu_begin(host, index, 0)->power_limit_mw = limit_mw;
    emu_commit(host, index);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device, nvmlPowerValue_v2_t *limit) {
    REQUIRE(limit != NULL);
    if (limit->version != nvmlPowerValue_v2)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (limit->powerScope != NVML_POWER_SCOPE_GPU)
        return NVML_ERROR_NOT_SUPPORTED;
    return nvmlDeviceSetPowerManagementLimit(device, limit->powerValueMw);
}

/* --- modes --- */

nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, nvmlEnableState_t mode) {
    REQUIRE(mode == NVML_FEATURE_ENABLED || mode == NVML_FEATURE_DISABLED);
    ENTER(device, EMU_CALLS_MODE_WRITE);
    emu_begin(host, index, 0)->persistence = mode;
    emu_commit(host, index);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceSetComputeMode(nvmlDevice_t device, nvmlComputeMode_t mode) {
    REQUIRE((unsigned)mode < NVML_COMPUTEMODE_COUNT);
    ENTER(device, EMU_CALLS_MODE_WRITE);
    if (mode == NVML_COMPUTEMODE_EXCLUSIVE_THREAD)
        return NVML_ERROR_NOT_SUPPORTED;
    emu_begin(host, index, 0)->compute_mode = mode;
    emu_commit(host, index);
    return NVML_SUCCESS;
}
