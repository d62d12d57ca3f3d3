#include "launch.h"

namespace zmqexec {

// An emulated device says what an H100 says.
static const char* device_info(int device, std::vector<int64_t>& info)
{
#ifdef __CUDACC__
    const cudaDeviceAttr attributes[] = {
        cudaDevAttrMultiProcessorCount,       cudaDevAttrComputeCapabilityMajor,
        cudaDevAttrComputeCapabilityMinor,    cudaDevAttrL2CacheSize,
        cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
        cudaDevAttrMaxThreadsPerMultiProcessor,
    };
    for (cudaDeviceAttr attribute : attributes) {
        int value = 0;
        const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, device);
        if (const char* error = cuda_error(status, "the device's attributes")) return error;
        info.push_back(value);
    }
#else
    check_argument(device == 0, "the emulator has device 0 alone");
    info = {132, 9, 0, 50 << 20, 227 << 10, 228 << 10, 2048};
#endif
    return nullptr;
}
BINDING(device_info,
        "device_info(device)\n\n"
        "(SMs, compute capability major, minor, bytes of L2, shared memory per block at most, per SM, threads per SM)")

}  // namespace zmqexec
