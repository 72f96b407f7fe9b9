/* NVML: what a GPU shows from moment to moment. Power is the mean over the engine's current iteration, so the averaged
 * and the instantaneous readings of a real driver are one and the same here. */
#include "nvml_surface.h"

#include <string.h>
#include <time.h>

/* Looks at a GPU: `view` is set, or the function has returned the error. */
#define LOOK(device, calls)                                                                                            \
    ENTER(device, calls);                                                                                              \
    struct emu_view view;                                                                                              \
    emu_observe(host, index, calls == EMU_CALLS_MEMORY || calls == EMU_CALLS_PROCESSES, &view)

static unsigned long long wall_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (unsigned long long)now.tv_sec * 1000000ull + (unsigned long long)now.tv_nsec / 1000;
}

/* Functions that hand out one figure of the view. */
#define FIGURE(name, type, calls, value)                                                                               \
    nvmlReturn_t name(nvmlDevice_t device, type *result) {                                                             \
        REQUIRE(result != NULL);                                                                                       \
        LOOK(device, calls);                                                                                           \
        *result = (type)(value);                                                                                       \
        return NVML_SUCCESS;                                                                                           \
    }

FIGURE(nvmlDeviceGetPowerUsage, unsigned int, EMU_CALLS_TELEMETRY, view.power_mw)
FIGURE(nvmlDeviceGetPowerManagementLimit, unsigned int, EMU_CALLS_TELEMETRY, view.power_limit_mw)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, unsigned int, EMU_CALLS_TELEMETRY, view.power_limit_mw)
FIGURE(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, EMU_CALLS_ENERGY, view.energy_nj / 1000000)
FIGURE(nvmlDeviceGetPersistenceMode, nvmlEnableState_t, EMU_CALLS_TELEMETRY, view.persistence)
FIGURE(nvmlDeviceGetComputeMode, nvmlComputeMode_t, EMU_CALLS_TELEMETRY, view.compute_mode)
/* Hopper stays in P0 and lowers its clocks there. */
FIGURE(nvmlDeviceGetPerformanceState, nvmlPstates_t, EMU_CALLS_TELEMETRY, ((void)view, NVML_PSTATE_0))
FIGURE(nvmlDeviceGetPowerState, nvmlPstates_t, EMU_CALLS_TELEMETRY, ((void)view, NVML_PSTATE_0))

/* --- clocks --- */

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    REQUIRE(clock != NULL && (unsigned)type < NVML_CLOCK_COUNT);
    LOOK(device, EMU_CALLS_TELEMETRY);
    if (type == NVML_CLOCK_MEM)
        *clock = view.memory_clock_mhz;
    else if (type == NVML_CLOCK_VIDEO)
        *clock = view.clock_mhz * 78 / 100;
    else
        *clock = view.clock_mhz;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, nvmlClockType_t type, nvmlClockId_t id, unsigned int *clock) {
    if (id == NVML_CLOCK_ID_CURRENT)
        return nvmlDeviceGetClockInfo(device, type, clock);
    REQUIRE((unsigned)id < NVML_CLOCK_ID_COUNT);
    return nvmlDeviceGetMaxCustomerBoostClock(device, type, clock);
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons) {
    REQUIRE(reasons != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY);
    /* A lock alone sets no bit: it is not a reason to run below what was asked for. */
    *reasons = view.idle ? nvmlClocksEventReasonGpuIdle : nvmlClocksEventReasonNone;
    if (view.power_capped)
        *reasons |= nvmlClocksEventReasonSwPowerCap;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}

/* --- utilisation --- */

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization) {
    REQUIRE(utilization != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY);
    if (view.mig)
        return NVML_ERROR_NOT_SUPPORTED;
    utilization->gpu = view.gpu_util;
    utilization->memory = view.mem_util;
    return NVML_SUCCESS;
}

/* Video engines that a language model leaves alone. */
#define UNUSED_ENGINE(name)                                                                                            \
    nvmlReturn_t name(nvmlDevice_t device, unsigned int *utilization, unsigned int *period_us) {                       \
        REQUIRE(utilization != NULL && period_us != NULL);                                                             \
        ENTER(device, EMU_CALLS_TELEMETRY);                                                                            \
        *utilization = 0;                                                                                              \
        *period_us = 100000;                                                                                           \
        return NVML_SUCCESS;                                                                                           \
    }

UNUSED_ENGINE(nvmlDeviceGetDecoderUtilization)
UNUSED_ENGINE(nvmlDeviceGetJpgUtilization)
UNUSED_ENGINE(nvmlDeviceGetOfaUtilization)
UNUSED_ENGINE(nvmlDeviceGetEncoderUtilization)

/* --- temperature --- */

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor, unsigned int *temperature) {
    REQUIRE(temperature != NULL && sensor == NVML_TEMPERATURE_GPU);
    LOOK(device, EMU_CALLS_TELEMETRY);
    *temperature = view.temperature_c;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature) {
    REQUIRE(temperature != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY);
    if (temperature->version != nvmlTemperature_v1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    REQUIRE(temperature->sensorType == NVML_TEMPERATURE_GPU);
    temperature->temperature = (int)view.temperature_c;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device, nvmlMarginTemperature_t *margin) {
    REQUIRE(margin != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY);
    if (margin->version != nvmlMarginTemperature_v1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    margin->marginTemperature = EMU_TEMPERATURE_GPU_MAX_C - (int)view.temperature_c;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetThermalSettings(nvmlDevice_t device, unsigned int sensor,
                                          nvmlGpuThermalSettings_t *settings) {
    REQUIRE(settings != NULL && (sensor == 0 || sensor == NVML_THERMAL_TARGET_ALL));
    LOOK(device, EMU_CALLS_TELEMETRY);
    memset(settings, 0, sizeof *settings);
    settings->count = 1;
    settings->sensor[0].controller = NVML_THERMAL_CONTROLLER_GPU_INTERNAL;
    settings->sensor[0].defaultMaxTemp = EMU_TEMPERATURE_SHUTDOWN_C;
    settings->sensor[0].currentTemp = (int)view.temperature_c;
    settings->sensor[0].target = NVML_THERMAL_TARGET_GPU;
    return NVML_SUCCESS;
}

/* --- memory --- */

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    REQUIRE(memory != NULL);
    LOOK(device, EMU_CALLS_MEMORY);
    memory->total = host->config.board.memory_bytes;
    memory->used = host->config.board.memory_reserved_bytes + view.used_bytes; /* the reserve counts as used here */
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    REQUIRE(memory != NULL);
    LOOK(device, EMU_CALLS_MEMORY);
    if (memory->version != nvmlMemory_v2)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memory->total = host->config.board.memory_bytes;
    memory->reserved = host->config.board.memory_reserved_bytes;
    memory->used = view.used_bytes;
    memory->free = memory->total - memory->reserved - memory->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *memory) {
    REQUIRE(memory != NULL);
    ENTER(device, EMU_CALLS_MEMORY);
    memory->bar1Total = 131072ull << 20;
    memory->bar1Used = 1ull << 20;
    memory->bar1Free = memory->bar1Total - memory->bar1Used;
    return NVML_SUCCESS;
}

/* --- processes --- */

static nvmlReturn_t list_processes(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_v2_t *list) {
    REQUIRE(count != NULL && (*count == 0 || list != NULL));
    LOOK(device, EMU_CALLS_PROCESSES);
    unsigned room = *count;
    *count = view.process_count;
    if (room < view.process_count)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned slot = 0; slot < view.process_count; slot++) {
        list[slot].pid = (unsigned)view.processes[slot].pid;
        list[slot].usedGpuMemory = view.processes[slot].used_bytes;
        list[slot].gpuInstanceId = list[slot].computeInstanceId = UINT32_MAX; /* no MIG instance */
    }
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                     nvmlProcessInfo_t *list) {
    return list_processes(device, count, list);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned int *count,
                                                     nvmlProcessInfo_v2_t *list) {
    return list_processes(device, count, list);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned int *count,
                                                  nvmlProcessInfo_v1_t *list) {
    nvmlProcessInfo_v2_t whole[EMU_MAX_PROCESSES];
    REQUIRE(count != NULL && (*count == 0 || list != NULL));
    unsigned room = *count < EMU_MAX_PROCESSES ? *count : EMU_MAX_PROCESSES;
    nvmlReturn_t result = list_processes(device, &room, whole);
    *count = room;
    for (unsigned slot = 0; result == NVML_SUCCESS && slot < room; slot++) {
        list[slot].pid = whole[slot].pid;
        list[slot].usedGpuMemory = whole[slot].usedGpuMemory;
    }
    return result;
}

/* Graphics and MPS: there are none. */
#define NO_PROCESSES(name, type)                                                                                       \
    nvmlReturn_t name(nvmlDevice_t device, unsigned int *count, type *list) {                                          \
        (void)list;                                                                                                    \
        REQUIRE(count != NULL);                                                                                        \
        ENTER(device, EMU_CALLS_PROCESSES);                                                                            \
        *count = 0;                                                                                                    \
        return NVML_SUCCESS;                                                                                           \
    }

NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses, nvmlProcessInfo_v1_t)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlProcessInfo_v2_t)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, nvmlProcessInfo_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses, nvmlProcessInfo_v1_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, nvmlProcessInfo_v2_t)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, nvmlProcessInfo_t)

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples,
                                             unsigned int *count, unsigned long long last_seen_us) {
    REQUIRE(count != NULL);
    LOOK(device, EMU_CALLS_PROCESSES);
    unsigned long long now_us = wall_us();
    unsigned room = samples == NULL ? 0 : *count, found = 0;
    for (unsigned slot = 0; slot < view.process_count && now_us > last_seen_us; slot++) {
        const struct emu_process *process = &view.processes[slot];
        if (process->gpu_util == 0 && process->mem_util == 0)
            continue; /* the driver keeps samples of working processes only */
        if (found < room)
            samples[found] = (nvmlProcessUtilizationSample_t){
                .pid = (unsigned)process->pid,
                .timeStamp = now_us,
                .smUtil = process->gpu_util,
                .memUtil = process->mem_util,
            };
        found++;
    }
    *count = found;
    if (found == 0)
        return NVML_ERROR_NOT_FOUND;
    return found <= room ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

/* --- modes and health --- */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending) {
    REQUIRE(current != NULL && pending != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY);
    *current = *pending = view.mig ? NVML_DEVICE_MIG_ENABLE : NVML_DEVICE_MIG_DISABLE;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, nvmlEnableState_t *current, nvmlEnableState_t *pending) {
    REQUIRE(current != NULL && pending != NULL);
    ENTER(device, EMU_CALLS_TELEMETRY);
    *current = *pending = NVML_FEATURE_ENABLED;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, nvmlMemoryErrorType_t type, nvmlEccCounterType_t counter,
                                         unsigned long long *count) {
    REQUIRE(count != NULL && (unsigned)type < NVML_MEMORY_ERROR_TYPE_COUNT &&
            (unsigned)counter < NVML_ECC_COUNTER_TYPE_COUNT);
    ENTER(device, EMU_CALLS_TELEMETRY);
    *count = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, nvmlMemoryErrorType_t type,
                                             nvmlEccCounterType_t counter, nvmlMemoryLocation_t location,
                                             unsigned long long *count) {
    REQUIRE((unsigned)location < NVML_MEMORY_LOCATION_COUNT);
    return nvmlDeviceGetTotalEccErrors(device, type, counter, count);
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned int *corrected, unsigned int *uncorrected,
                                       unsigned int *pending, unsigned int *failed) {
    REQUIRE(corrected != NULL && uncorrected != NULL && pending != NULL && failed != NULL);
    ENTER(device, EMU_CALLS_TELEMETRY);
    *corrected = *uncorrected = *pending = *failed = 0;
    return NVML_SUCCESS;
}

/* --- field values --- */

static nvmlReturn_t read_field(const struct emu_host *host, const struct emu_view *view, nvmlFieldValue_t *field) {
    const struct emu_board *board = &host->config.board;
    field->valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
    switch (field->fieldId) {
    case NVML_FI_DEV_POWER_INSTANT:
    case NVML_FI_DEV_POWER_AVERAGE:
        if (field->scopeId != NVML_POWER_SCOPE_GPU)
            return NVML_ERROR_NOT_SUPPORTED; /* no module around an x86 H100 */
        field->value.uiVal = view->power_mw;
        return NVML_SUCCESS;
    case NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
        field->valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
        field->value.ullVal = view->energy_nj / 1000000;
        return NVML_SUCCESS;
    case NVML_FI_DEV_POWER_MIN_LIMIT:
        field->value.uiVal = board->power_limit_min_mw;
        return NVML_SUCCESS;
    case NVML_FI_DEV_POWER_MAX_LIMIT:
        field->value.uiVal = board->power_limit_max_mw;
        return NVML_SUCCESS;
    case NVML_FI_DEV_POWER_DEFAULT_LIMIT:
        field->value.uiVal = board->power_limit_default_mw;
        return NVML_SUCCESS;
    case NVML_FI_DEV_POWER_CURRENT_LIMIT:
    case NVML_FI_DEV_POWER_REQUESTED_LIMIT:
        field->value.uiVal = view->power_limit_mw;
        return NVML_SUCCESS;
    case NVML_FI_DEV_MEMORY_TEMP:
        field->value.uiVal = view->memory_temperature_c;
        return NVML_SUCCESS;
    case NVML_FI_DEV_ECC_CURRENT:
    case NVML_FI_DEV_ECC_PENDING:
        field->value.uiVal = NVML_FEATURE_ENABLED;
        return NVML_SUCCESS;
    case NVML_FI_DEV_NVLINK_LINK_COUNT:
        field->value.uiVal = 18;
        return NVML_SUCCESS;
    case NVML_FI_DEV_NVLINK_GET_SPEED:
    case NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON:
        field->value.uiVal = 26562; /* MB/s a link and direction */
        return NVML_SUCCESS;
    default:
        break;
    }
    /* Degrees left to each limit, counted from the highest operating temperature. */
    field->valueType = NVML_VALUE_TYPE_SIGNED_INT;
    switch (field->fieldId) {
    case NVML_FI_DEV_TEMPERATURE_SHUTDOWN_TLIMIT:
        field->value.siVal = EMU_TEMPERATURE_GPU_MAX_C - EMU_TEMPERATURE_SHUTDOWN_C;
        return NVML_SUCCESS;
    case NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT:
        field->value.siVal = EMU_TEMPERATURE_GPU_MAX_C - EMU_TEMPERATURE_SLOWDOWN_C;
        return NVML_SUCCESS;
    case NVML_FI_DEV_TEMPERATURE_GPU_MAX_TLIMIT:
    case NVML_FI_DEV_TEMPERATURE_MEM_MAX_TLIMIT:
        field->value.siVal = 0;
        return NVML_SUCCESS;
    default:
        return NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values) {
    REQUIRE(values != NULL && count > 0);
    LOOK(device, EMU_CALLS_TELEMETRY);
    for (int slot = 0; slot < count; slot++) {
        nvmlFieldValue_t *field = &values[slot];
        field->timestamp = (long long)wall_us();
        field->latencyUsec = 0;
        field->nvmlReturn = NVML_SUCCESS;
        if (field->fieldId == NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION)
            field->nvmlReturn = (nvmlReturn_t)emu_suffer(host, index, EMU_CALLS_ENERGY);
        if (field->nvmlReturn == NVML_SUCCESS)
            field->nvmlReturn = read_field(host, &view, field);
    }
    return NVML_SUCCESS;
}
