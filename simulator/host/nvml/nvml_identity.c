/* NVML: who a GPU is and how it is connected: what does not change while the host runs. The board is that of an HGX
 * H100: eight modules behind NVSwitches, four to a CPU socket. */
#include "nvml_surface.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define H100_PCI_DEVICE 0x233010DEu
#define H100_PCI_SUBSYSTEM 0x16C110DEu
#define NVSWITCH_PCI_DEVICE 0x22A310DEu
#define NVLINKS 18u
#define BITS (8 * sizeof(unsigned long))

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(name, length, host->config.board.name);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(uuid, length, host->config.gpus[index].uuid);
}

nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(serial, length, host->config.gpus[index].serial);
}

nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *version, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(version, length, "96.00.89.00.01");
}

nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t device, char *number, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(number, length, "692-2G520-0200-000");
}

nvmlReturn_t nvmlDeviceGetInforomImageVersion(nvmlDevice_t device, char *version, unsigned int length) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(version, length, "G520.0200.00.05");
}

/* Functions that hand out one fixed number. */
#define NUMBER(name, type, value)                                                                                      \
    nvmlReturn_t name(nvmlDevice_t device, type *result) {                                                             \
        REQUIRE(result != NULL);                                                                                       \
        ENTER(device, EMU_CALLS_IDENTITY);                                                                             \
        *result = (type)(value);                                                                                       \
        return NVML_SUCCESS;                                                                                           \
    }

NUMBER(nvmlDeviceGetIndex, unsigned int, emu_position(host, index))
NUMBER(nvmlDeviceGetMinorNumber, unsigned int, index)
NUMBER(nvmlDeviceGetModuleId, unsigned int, index + 1)
NUMBER(nvmlDeviceGetBoardId, unsigned int,
       host->config.gpus[index].pci_domain << 16 | host->config.gpus[index].pci_bus << 8)
NUMBER(nvmlDeviceGetMultiGpuBoard, unsigned int, 0)
NUMBER(nvmlDeviceGetBrand, nvmlBrandType_t, NVML_BRAND_NVIDIA)
NUMBER(nvmlDeviceGetArchitecture, nvmlDeviceArchitecture_t, NVML_DEVICE_ARCH_HOPPER)
NUMBER(nvmlDeviceGetNumGpuCores, unsigned int, 16896)
NUMBER(nvmlDeviceGetMemoryBusWidth, unsigned int, 5120)
NUMBER(nvmlDeviceGetBusType, nvmlBusType_t, NVML_BUS_TYPE_PCIE)
NUMBER(nvmlDeviceGetIrqNum, unsigned int, 100 + index)
NUMBER(nvmlDeviceGetPowerSource, nvmlPowerSource_t, NVML_POWER_SOURCE_AC)
NUMBER(nvmlDeviceGetNumFans, unsigned int, 0) /* cooled by the chassis */
NUMBER(nvmlDeviceGetMaxMigDeviceCount, unsigned int, 7)
NUMBER(nvmlDeviceIsMigDeviceHandle, unsigned int, 0)
NUMBER(nvmlDeviceGetDisplayMode, nvmlEnableState_t, NVML_FEATURE_DISABLED)
NUMBER(nvmlDeviceGetDisplayActive, nvmlEnableState_t, NVML_FEATURE_DISABLED)
NUMBER(nvmlDeviceGetVirtualizationMode, nvmlGpuVirtualizationMode_t, NVML_GPU_VIRTUALIZATION_MODE_NONE)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned int, 5)
NUMBER(nvmlDeviceGetGpuMaxPcieLinkGeneration, unsigned int, 5)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned int, 5)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, unsigned int, 16)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, unsigned int, 16)
NUMBER(nvmlDeviceGetPcieLinkMaxSpeed, unsigned int, NVML_PCIE_LINK_MAX_SPEED_32000MBPS)
NUMBER(nvmlDeviceGetPcieSpeed, unsigned int, 32000)
NUMBER(nvmlDeviceGetPcieReplayCounter, unsigned int, 0)
NUMBER(nvmlDeviceGetDefaultEccMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
NUMBER(nvmlDeviceGetPowerManagementMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, unsigned int, host->config.board.power_limit_default_mw)

nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned int *least,
                                                          unsigned int *most) {
    REQUIRE(least != NULL && most != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    *least = host->config.board.power_limit_min_mw;
    *most = host->config.board.power_limit_max_mw;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    REQUIRE(major != NULL && minor != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    *major = 9;
    *minor = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGspFirmwareMode(nvmlDevice_t device, unsigned int *enabled, unsigned int *by_default) {
    REQUIRE(enabled != NULL && by_default != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    *enabled = *by_default = 1;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGspFirmwareVersion(nvmlDevice_t device, char *version) {
    ENTER(device, EMU_CALLS_IDENTITY);
    return emu_text(version, NVML_GSP_FIRMWARE_VERSION_BUF_SIZE, host->config.driver_version);
}

/* --- PCI --- */

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    REQUIRE(pci != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    memset(pci, 0, sizeof *pci);
    emu_bus_id(host, index, pci->busId);
    /* The old form has a domain of four digits. */
    memcpy(pci->busIdLegacy, pci->busId + 4, sizeof pci->busIdLegacy - 1);
    pci->domain = host->config.gpus[index].pci_domain;
    pci->bus = host->config.gpus[index].pci_bus;
    pci->pciDeviceId = H100_PCI_DEVICE;
    pci->pciSubSystemId = H100_PCI_SUBSYSTEM;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    /* Callers of the older versions hold a structure without the long bus id: write only what all of them share. */
    REQUIRE(pci != NULL);
    nvmlPciInfo_t whole;
    nvmlReturn_t result = nvmlDeviceGetPciInfo_v3(device, &whole);
    if (result == NVML_SUCCESS)
        memcpy(pci, &whole, offsetof(nvmlPciInfo_t, busId));
    return result;
}

nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    return nvmlDeviceGetPciInfo_v2(device, pci);
}

nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, nvmlPciInfoExt_t *pci) {
    REQUIRE(pci != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    if (pci->version != nvmlPciInfoExt_v1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    emu_bus_id(host, index, pci->busId);
    pci->domain = host->config.gpus[index].pci_domain;
    pci->bus = host->config.gpus[index].pci_bus;
    pci->device = 0;
    pci->pciDeviceId = H100_PCI_DEVICE;
    pci->pciSubSystemId = H100_PCI_SUBSYSTEM;
    pci->baseClass = 0x03; /* display controller, 3D */
    pci->subClass = 0x02;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, nvmlPcieUtilCounter_t counter, unsigned int *value) {
    REQUIRE(value != NULL && (unsigned)counter < NVML_PCIE_UTIL_COUNT);
    ENTER(device, EMU_CALLS_TELEMETRY);
    *value = 0; /* weights and tokens hardly use the bus once a model is loaded */
    return NVML_SUCCESS;
}

/* --- clocks and states that exist --- */

nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    REQUIRE(clock != NULL && (unsigned)type < NVML_CLOCK_COUNT);
    ENTER(device, EMU_CALLS_IDENTITY);
    const struct emu_board *board = &host->config.board;
    if (type == NVML_CLOCK_MEM)
        *clock = board->memory_clock_mhz;
    else if (type == NVML_CLOCK_VIDEO)
        *clock = board->clock_max_mhz * 78 / 100;
    else
        *clock = board->clock_max_mhz;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    return nvmlDeviceGetMaxClockInfo(device, type, clock);
}

nvmlReturn_t nvmlDeviceGetDefaultApplicationsClock(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    return nvmlDeviceGetMaxClockInfo(device, type, clock);
}

nvmlReturn_t nvmlDeviceGetApplicationsClock(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock) {
    return nvmlDeviceGetMaxClockInfo(device, type, clock);
}

/* NVML's way with lists: the count comes back even when the room is too small. */
static int room_for(unsigned wanted, unsigned *count, const void *list) {
    int fits = list != NULL && *count >= wanted;
    *count = wanted;
    return fits;
}

nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned int *count, unsigned int *clocks) {
    REQUIRE(count != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    if (!room_for(2, count, clocks))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    clocks[0] = host->config.board.memory_clock_mhz;
    clocks[1] = host->config.board.memory_clock_low_mhz;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned int memory_clock, unsigned int *count,
                                                  unsigned int *clocks) {
    REQUIRE(count != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    const struct emu_board *board = &host->config.board;
    if (memory_clock != board->memory_clock_mhz && memory_clock != board->memory_clock_low_mhz)
        return NVML_ERROR_NOT_FOUND;
    if (!room_for((board->clock_max_mhz - board->clock_min_mhz) / board->clock_step_mhz + 1, count, clocks))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned step = 0; step < *count; step++)
        clocks[step] = board->clock_max_mhz - step * board->clock_step_mhz;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedPerformanceStates(nvmlDevice_t device, nvmlPstates_t *states, unsigned int size) {
    REQUIRE(states != NULL && size >= sizeof *states);
    ENTER(device, EMU_CALLS_IDENTITY);
    for (unsigned slot = 0; slot < size / sizeof *states; slot++)
        states[slot] = NVML_PSTATE_UNKNOWN;
    states[0] = NVML_PSTATE_0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMinMaxClockOfPState(nvmlDevice_t device, nvmlClockType_t type, nvmlPstates_t state,
                                              unsigned int *least, unsigned int *most) {
    REQUIRE(least != NULL && most != NULL && state == NVML_PSTATE_0);
    nvmlReturn_t result = nvmlDeviceGetMaxClockInfo(device, type, most);
    if (result == NVML_SUCCESS)
        *least = type == NVML_CLOCK_MEM ? *most : emu_host()->config.board.clock_min_mhz;
    return result;
}

nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons) {
    REQUIRE(reasons != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    *reasons = nvmlClocksEventReasonGpuIdle | nvmlClocksEventReasonApplicationsClocksSetting |
               nvmlClocksEventReasonSwPowerCap | nvmlClocksThrottleReasonHwSlowdown | nvmlClocksEventReasonSyncBoost |
               nvmlClocksEventReasonSwThermalSlowdown | nvmlClocksThrottleReasonHwThermalSlowdown |
               nvmlClocksThrottleReasonHwPowerBrakeSlowdown;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, nvmlTemperatureThresholds_t type,
                                               unsigned int *limit) {
    static const unsigned limits[] = {
        [NVML_TEMPERATURE_THRESHOLD_SHUTDOWN] = EMU_TEMPERATURE_SHUTDOWN_C,
        [NVML_TEMPERATURE_THRESHOLD_SLOWDOWN] = EMU_TEMPERATURE_SLOWDOWN_C,
        [NVML_TEMPERATURE_THRESHOLD_MEM_MAX] = EMU_TEMPERATURE_MEMORY_MAX_C,
        [NVML_TEMPERATURE_THRESHOLD_GPU_MAX] = EMU_TEMPERATURE_GPU_MAX_C,
    };
    REQUIRE(limit != NULL && (unsigned)type < NVML_TEMPERATURE_THRESHOLD_COUNT);
    ENTER(device, EMU_CALLS_IDENTITY);
    if (type > NVML_TEMPERATURE_THRESHOLD_GPU_MAX)
        return NVML_ERROR_NOT_SUPPORTED;
    *limit = limits[type];
    return NVML_SUCCESS;
}

/* --- sockets and NVLink --- */

nvmlReturn_t nvmlDeviceGetCpuAffinity(nvmlDevice_t device, unsigned int words, unsigned long *cpus) {
    REQUIRE(cpus != NULL && words > 0);
    ENTER(device, EMU_CALLS_IDENTITY);
    unsigned nodes = host->config.gpus[host->config.gpu_count - 1].numa_node + 1;
    unsigned count = (unsigned)sysconf(_SC_NPROCESSORS_CONF);
    memset(cpus, 0, words * sizeof *cpus);
    /* The machine's own CPUs, dealt out over the emulated sockets. */
    for (unsigned cpu = 0; cpu < count && cpu < words * BITS; cpu++)
        if (count < nodes || cpu * nodes / count == host->config.gpus[index].numa_node)
            cpus[cpu / BITS] |= 1ul << cpu % BITS;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCpuAffinityWithinScope(nvmlDevice_t device, unsigned int words, unsigned long *cpus,
                                                 nvmlAffinityScope_t scope) {
    REQUIRE(scope == NVML_AFFINITY_SCOPE_NODE || scope == NVML_AFFINITY_SCOPE_SOCKET);
    return nvmlDeviceGetCpuAffinity(device, words, cpus);
}

nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t device, unsigned int words, unsigned long *nodes,
                                         nvmlAffinityScope_t scope) {
    REQUIRE(nodes != NULL && words > 0 && (scope == NVML_AFFINITY_SCOPE_NODE || scope == NVML_AFFINITY_SCOPE_SOCKET));
    ENTER(device, EMU_CALLS_IDENTITY);
    memset(nodes, 0, words * sizeof *nodes);
    nodes[0] = 1ul << host->config.gpus[index].numa_node;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t device, nvmlDevice_t other,
                                                 nvmlGpuTopologyLevel_t *level) {
    unsigned int ignored;
    REQUIRE(level != NULL);
    nvmlReturn_t result = nvmlDeviceGetIndex(other, &ignored);
    if (result != NVML_SUCCESS)
        return result;
    ENTER(device, EMU_CALLS_IDENTITY);
    const struct emu_identity *gpus = host->config.gpus;
    if (device == other)
        *level = NVML_TOPOLOGY_INTERNAL;
    else if (gpus[index].numa_node == gpus[other->index].numa_node)
        *level = NVML_TOPOLOGY_NODE;
    else
        *level = NVML_TOPOLOGY_SYSTEM;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTopologyNearestGpus(nvmlDevice_t device, nvmlGpuTopologyLevel_t level, unsigned int *count,
                                              nvmlDevice_t *nearest) {
    REQUIRE(count != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    unsigned found = 0, room = nearest == NULL ? 0 : *count;
    for (unsigned other = 0; other < host->config.gpu_count; other++) {
        int near = host->config.gpus[index].numa_node == host->config.gpus[other].numa_node;
        if (other == index || level != (near ? NVML_TOPOLOGY_NODE : NVML_TOPOLOGY_SYSTEM))
            continue;
        if (found < room)
            nearest[found] = emu_device(other);
        found++;
    }
    *count = nearest == NULL || found < room ? found : room;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t device, nvmlDevice_t other, nvmlGpuP2PCapsIndex_t capability,
                                    nvmlGpuP2PStatus_t *status) {
    unsigned int ignored;
    REQUIRE(status != NULL && (unsigned)capability <= NVML_P2P_CAPS_INDEX_UNKNOWN);
    nvmlReturn_t result = nvmlDeviceGetIndex(other, &ignored);
    if (result != NVML_SUCCESS)
        return result;
    ENTER(device, EMU_CALLS_IDENTITY);
    *status = NVML_P2P_STATUS_OK;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceOnSameBoard(nvmlDevice_t device, nvmlDevice_t other, int *same) {
    REQUIRE(same != NULL && other != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    *same = device == other;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned int link, nvmlEnableState_t *active) {
    REQUIRE(active != NULL && link < NVLINKS);
    ENTER(device, EMU_CALLS_IDENTITY);
    *active = NVML_FEATURE_ENABLED;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkVersion(nvmlDevice_t device, unsigned int link, unsigned int *version) {
    REQUIRE(version != NULL && link < NVLINKS);
    ENTER(device, EMU_CALLS_IDENTITY);
    *version = 4;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkCapability(nvmlDevice_t device, unsigned int link, nvmlNvLinkCapability_t capability,
                                           unsigned int *result) {
    REQUIRE(result != NULL && link < NVLINKS && (unsigned)capability < NVML_NVLINK_CAP_COUNT);
    ENTER(device, EMU_CALLS_IDENTITY);
    *result = capability != NVML_NVLINK_CAP_SLI_BRIDGE;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t device, unsigned int link, nvmlNvLinkErrorCounter_t counter,
                                             unsigned long long *value) {
    REQUIRE(value != NULL && link < NVLINKS && (unsigned)counter < NVML_NVLINK_ERROR_COUNT);
    ENTER(device, EMU_CALLS_TELEMETRY);
    *value = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, unsigned int link,
                                                 nvmlIntNvLinkDeviceType_t *type) {
    REQUIRE(type != NULL && link < NVLINKS);
    ENTER(device, EMU_CALLS_IDENTITY);
    *type = NVML_NVLINK_DEVICE_TYPE_SWITCH;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned int link, nvmlPciInfo_t *pci) {
    REQUIRE(pci != NULL && link < NVLINKS);
    ENTER(device, EMU_CALLS_IDENTITY);
    memset(pci, 0, sizeof *pci);
    pci->bus = 5 + link % 4; /* four switches share the links */
    pci->pciDeviceId = NVSWITCH_PCI_DEVICE;
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    memcpy(pci->busIdLegacy, pci->busId + 4, sizeof pci->busIdLegacy - 1);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, nvmlGpuFabricInfo_t *fabric) {
    REQUIRE(fabric != NULL);
    ENTER(device, EMU_CALLS_IDENTITY);
    memset(fabric, 0, sizeof *fabric);
    fabric->state = NVML_GPU_FABRIC_STATE_COMPLETED;
    fabric->status = NVML_SUCCESS;
    return NVML_SUCCESS;
}
