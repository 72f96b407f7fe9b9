/* NVML: starting and stopping the library, what concerns the host as a whole, and handles. */
#include "nvml_surface.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static unsigned users; /* nvmlInit calls not yet matched by nvmlShutdown */
static _Atomic(struct emu_host *) in_use;
/* Kept over nvmlShutdown: another thread may still be inside a call, hung for instance. */
static struct emu_host *mapped;
static struct stat mapped_file;
static struct nvmlDevice_st devices[EMU_MAX_GPUS];
static _Atomic uint64_t since_epoch; /* of the driver, at nvmlInit */

struct emu_host *emu_host(void) { return atomic_load_explicit(&in_use, memory_order_acquire); }

nvmlDevice_t emu_device(unsigned index) { return &devices[index]; }

int emu_unsupported(void) { return emu_host() == NULL ? NVML_ERROR_UNINITIALIZED : NVML_ERROR_NOT_SUPPORTED; }

nvmlReturn_t emu_enter(nvmlDevice_t device, enum emu_calls calls, struct emu_host **host) {
    *host = emu_host();
    if (*host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    if (device < devices || device >= devices + (*host)->config.gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (atomic_load(&(*host)->driver_epoch) != atomic_load(&since_epoch))
        return NVML_ERROR_GPU_IS_LOST; /* the driver it was opened under is gone */
    return (nvmlReturn_t)emu_suffer(*host, device->index, calls);
}

nvmlReturn_t emu_text(char *target, unsigned length, const char *text) {
    REQUIRE(target != NULL);
    if (strlen(text) >= length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(target, text);
    return NVML_SUCCESS;
}

/* --- start and stop --- */

/* As a real library says it: no driver, a driver of another version, no access to the device files. */
static nvmlReturn_t find_host(void) {
    const char *path = getenv(EMU_STATE_VARIABLE);
    struct emu_host *host;
    struct stat file;
    if (path == NULL || *path == '\0' || stat(path, &file) != 0)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (mapped != NULL && file.st_dev == mapped_file.st_dev && file.st_ino == mapped_file.st_ino)
        return NVML_SUCCESS;
    switch (emu_open(path, &host)) {
    case 0:
        mapped = host;
        mapped_file = file;
        return NVML_SUCCESS;
    case -EPROTO:
    case -ESTALE:
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    case -EACCES:
    case -EPERM:
        return NVML_ERROR_NO_PERMISSION;
    default:
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags; /* they are about hosts whose GPUs cannot be attached */
    pthread_mutex_lock(&starting);
    nvmlReturn_t result = users == 0 ? find_host() : NVML_SUCCESS;
    if (result == NVML_SUCCESS && users == 0 && atomic_load(&mapped->driver_epoch) % 2 != 0)
        result = NVML_ERROR_DRIVER_NOT_LOADED;
    if (result == NVML_SUCCESS && users++ == 0) {
        atomic_store(&since_epoch, atomic_load(&mapped->driver_epoch));
        for (unsigned index = 0; index < EMU_MAX_GPUS; index++)
            devices[index].index = index;
        atomic_store_explicit(&in_use, mapped, memory_order_release);
    }
    pthread_mutex_unlock(&starting);
    return result;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    pthread_mutex_lock(&starting);
    nvmlReturn_t result = users == 0 ? NVML_ERROR_UNINITIALIZED : NVML_SUCCESS;
    users -= users != 0;
    if (users == 0)
        atomic_store_explicit(&in_use, NULL, memory_order_release);
    pthread_mutex_unlock(&starting);
    return result;
}

/* --- the host --- */

const char *nvmlErrorString(nvmlReturn_t result) {
    static const char *const texts[] = {
        [NVML_SUCCESS] = "Success",
        [NVML_ERROR_UNINITIALIZED] = "Uninitialized",
        [NVML_ERROR_INVALID_ARGUMENT] = "Invalid Argument",
        [NVML_ERROR_NOT_SUPPORTED] = "Not Supported",
        [NVML_ERROR_NO_PERMISSION] = "Insufficient Permissions",
        [NVML_ERROR_ALREADY_INITIALIZED] = "Already Initialized",
        [NVML_ERROR_NOT_FOUND] = "Not Found",
        [NVML_ERROR_INSUFFICIENT_SIZE] = "Insufficient Size",
        [NVML_ERROR_INSUFFICIENT_POWER] = "Insufficient External Power",
        [NVML_ERROR_DRIVER_NOT_LOADED] = "Driver Not Loaded",
        [NVML_ERROR_TIMEOUT] = "Timeout",
        [NVML_ERROR_IRQ_ISSUE] = "Interrupt Request Issue",
        [NVML_ERROR_LIBRARY_NOT_FOUND] = "NVML Shared Library Not Found",
        [NVML_ERROR_FUNCTION_NOT_FOUND] = "Function Not Found",
        [NVML_ERROR_CORRUPTED_INFOROM] = "Corrupted infoROM",
        [NVML_ERROR_GPU_IS_LOST] = "GPU is lost",
        [NVML_ERROR_RESET_REQUIRED] = "GPU requires restart",
        [NVML_ERROR_OPERATING_SYSTEM] = "The operating system has blocked the request.",
        [NVML_ERROR_LIB_RM_VERSION_MISMATCH] = "RM has detected an NVML/RM version mismatch.",
        [NVML_ERROR_IN_USE] = "In use by another client",
        [NVML_ERROR_MEMORY] = "Insufficient Memory",
        [NVML_ERROR_NO_DATA] = "No data",
        [NVML_ERROR_INSUFFICIENT_RESOURCES] = "Insufficient Resources",
        [NVML_ERROR_FREQ_NOT_SUPPORTED] = "Requested frequency is not supported",
        [NVML_ERROR_ARGUMENT_VERSION_MISMATCH] = "Argument version mismatch",
        [NVML_ERROR_DEPRECATED] = "Deprecated",
        [NVML_ERROR_NOT_READY] = "Not ready",
        [NVML_ERROR_GPU_NOT_FOUND] = "GPU not found",
        [NVML_ERROR_INVALID_STATE] = "Invalid state",
    };
    if ((unsigned)result < sizeof texts / sizeof *texts && texts[result] != NULL)
        return texts[result];
    return "Unknown Error";
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    struct emu_host *host = emu_host();
    return host == NULL ? NVML_ERROR_UNINITIALIZED : emu_text(version, length, host->config.driver_version);
}

nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned int length) {
    char text[NVML_SYSTEM_NVML_VERSION_BUFFER_SIZE + 4];
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    snprintf(text, sizeof text, "%d.%s", NVML_API_VERSION, host->config.driver_version);
    return emu_text(version, length, text);
}

nvmlReturn_t nvmlSystemGetDriverBranch(nvmlSystemDriverBranchInfo_t *info, unsigned int length) {
    struct emu_host *host = emu_host();
    char text[NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE];
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(info != NULL);
    if (info->version != nvmlSystemDriverBranchInfo_v1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    snprintf(text, sizeof text, "r%d_00", atoi(host->config.driver_version));
    return emu_text(info->branch, length < sizeof info->branch ? length : sizeof info->branch, text);
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    if (emu_host() == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(version != NULL);
    *version = NVML_API_VERSION * 1000;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

nvmlReturn_t nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int length) {
    char path[40];
    if (emu_host() == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(name != NULL && length > 0);
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno == EACCES ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_NOT_FOUND;
    ssize_t got = read(file, name, length - 1);
    close(file);
    name[got > 0 ? got : 0] = '\0'; /* ends at the first argument's own NUL */
    return got > 0 ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlUnitGetCount(unsigned int *count) { /* S-class units have not been made for long */
    if (emu_host() == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(count != NULL);
    *count = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGetExcludedDeviceCount(unsigned int *count) { return nvmlUnitGetCount(count); }

/* --- handles --- */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(count != NULL);
    *count = host->config.gpu_count;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCount(unsigned int *count) { return nvmlDeviceGetCount_v2(count); }

static nvmlReturn_t hand_out(unsigned index, nvmlDevice_t *device) {
    struct emu_host *host;
    nvmlReturn_t entered = emu_enter(&devices[index], EMU_CALLS_HANDLE, &host);
    if (entered == NVML_SUCCESS)
        *device = &devices[index];
    return entered;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(device != NULL && index < host->config.gpu_count);
    return hand_out(host->order[index], device);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(device != NULL && uuid != NULL);
    for (unsigned index = 0; index < host->config.gpu_count; index++)
        if (strcmp(uuid, host->config.gpus[index].uuid) == 0)
            return hand_out(index, device);
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetHandleByUUIDV(const nvmlUUID_t *uuid, nvmlDevice_t *device) {
    REQUIRE(uuid != NULL);
    if (uuid->version != nvmlUUID_v1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (uuid->type != NVML_UUID_TYPE_ASCII)
        return uuid->type == NVML_UUID_TYPE_BINARY ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByUUID(uuid->value.str, device);
}

nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device) {
    struct emu_host *host = emu_host();
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(device != NULL && serial != NULL);
    for (unsigned index = 0; index < host->config.gpu_count; index++)
        if (strcmp(serial, host->config.gpus[index].serial) == 0)
            return hand_out(index, device);
    return NVML_ERROR_NOT_FOUND;
}

void emu_bus_id(const struct emu_host *host, unsigned index, char text[NVML_DEVICE_PCI_BUS_ID_BUFFER_SIZE]) {
    const struct emu_identity *gpu = &host->config.gpus[index];
    snprintf(text, NVML_DEVICE_PCI_BUS_ID_BUFFER_SIZE, "%08X:%02X:00.0", gpu->pci_domain, gpu->pci_bus);
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device) {
    struct emu_host *host = emu_host();
    unsigned domain, bus, slot;
    if (host == NULL)
        return NVML_ERROR_UNINITIALIZED;
    REQUIRE(device != NULL && bus_id != NULL);
    if (sscanf(bus_id, "%x:%x:%x", &domain, &bus, &slot) != 3) {
        domain = 0;
        REQUIRE(sscanf(bus_id, "%x:%x", &bus, &slot) == 2);
    }
    for (unsigned index = 0; index < host->config.gpu_count; index++)
        if (host->config.gpus[index].pci_domain == domain && host->config.gpus[index].pci_bus == bus && slot == 0)
            return hand_out(index, device);
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *bus_id, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(bus_id, device);
}
