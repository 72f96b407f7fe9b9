/* What the files of the NVML surface share. NVIDIA's header is the contract: with its prototypes in sight a function of
 * a wrong signature, or one that NVML does not have, fails to compile; and only what it declares is exported. */
#ifndef DYNAMOLLM_NVML_SURFACE_H
#define DYNAMOLLM_NVML_SURFACE_H

#define NVML_NO_UNVERSIONED_FUNC_DEFS /* old names are functions of their own, as in the real library */
#pragma GCC visibility push(default)
#include <nvml.h>
#pragma GCC visibility pop

#include "host_state.h"

/* A handle: points into a table that lives as long as the process, so one kept over nvmlShutdown stays valid. */
struct nvmlDevice_st {
    unsigned index;
};

/* The host in use, or NULL before nvmlInit and after nvmlShutdown. */
struct emu_host *emu_host(void);
nvmlDevice_t emu_device(unsigned index);
/* Checks library and handle, waits out injected hangs and delays, returns injected errors. */
nvmlReturn_t emu_enter(nvmlDevice_t device, enum emu_calls calls, struct emu_host **host);
/* Copies a text with the rules of NVML: INSUFFICIENT_SIZE when it does not fit. */
nvmlReturn_t emu_text(char *target, unsigned length, const char *text);
void emu_bus_id(const struct emu_host *host, unsigned index, char text[NVML_DEVICE_PCI_BUS_ID_BUFFER_SIZE]);
int emu_unsupported(void);

/* Opens a function on a device: `host` and `index` are set, or the function has returned the error. */
#define ENTER(device, calls)                                                                                           \
    struct emu_host *host;                                                                                             \
    nvmlReturn_t entered = emu_enter(device, calls, &host);                                                            \
    if (entered != NVML_SUCCESS)                                                                                       \
        return entered;                                                                                                \
    const unsigned index = (device)->index;                                                                            \
    (void)index

/* Out-parameters may not be NULL. */
#define REQUIRE(condition)                                                                                             \
    if (!(condition))                                                                                                  \
    return NVML_ERROR_INVALID_ARGUMENT

#endif
