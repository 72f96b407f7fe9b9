/* NVML: what a GPU shows from moment to moment. */
#include "nvml_surface.h"

/* Looks at a GPU, or returns the error: `view` is set afterwards. */
#define LOOK(device, calls, fresh)                                                                                     \
    ENTER(device, calls);                                                                                              \
    struct emu_view view;                                                                                              \
    emu_observe(host, index, fresh, &view)

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *power) {
    REQUIRE(power != NULL);
    LOOK(device, EMU_CALLS_TELEMETRY, 0);
    *power = view.power_mw;
    return NVML_SUCCESS;
}
