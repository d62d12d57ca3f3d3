// Starting a kernel, the same from both builds.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "binding.h"
#include "device.cuh"

namespace zmqexec {

// Calls `function` with a null pointer to the C++ type: `with_dtype(dtype, [&](auto* t) { using T = ...; })`.
template <class Function>
const char* with_dtype(Dtype dtype, Function&& function)
{
    switch (dtype) {
        case Dtype::float32: return function(static_cast<float*>(nullptr));
        case Dtype::bfloat16: return function(static_cast<bf16*>(nullptr));
        case Dtype::float16: return function(static_cast<fp16*>(nullptr));
    }
    throw BadArgument("unknown dtype");
}

inline bool is_aligned_16(const void* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
constexpr T divide_up(T a, T b)
{
    return (a + b - 1) / b;
}

// The last error's text, for a `const char*` result. The GIL is held wherever launch() is called.
inline const char* error_text(std::string text)
{
    static std::string last;
    last = std::move(text);
    return last.c_str();
}

// Blocks in x, y and z; those of a cluster are neighbours in x.
struct Blocks {
    dim3 grid;
    unsigned cluster = 1;
    Blocks(dim3 grid, unsigned cluster = 1) : grid(grid), cluster(cluster) {}
    bool none() const { return grid.x == 0 || grid.y == 0 || grid.z == 0; }
};

#ifdef __CUDACC__

inline const char* cuda_error(cudaError_t error, const char* what)
{
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next call would report it again
    return error_text(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Compute capability · 10 of the current device.
inline const char* current_capability(int& device, int& capability)
{
    static int known[64];
    if (const char* error = cuda_error(cudaGetDevice(&device), "cudaGetDevice")) return error;
    if (device < 64 && known[device] != 0) {
        capability = known[device];
        return nullptr;
    }
    int major = 0, minor = 0;
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (const char* error = cuda_error(status, "cudaDeviceGetAttribute")) return error;
    capability = 10 * major + minor;
    if (device < 64) known[device] = capability;
    return nullptr;
}

// Once per kernel and device, and again when a block needs more shared memory: above 48 KB one has to ask.
//
// All kernels want the same split of L1 and shared memory, the largest: an SM must be idle to change it, so that a
// kernel with another split could not start beside the end of its predecessor.
inline const char* prepare(const void* kernel, int device, std::size_t bytes)
{
    static std::map<std::pair<const void*, int>, std::size_t> allowed;
    const auto [entry, is_new] = allowed.try_emplace({kernel, device}, 48 * 1024);
    if (is_new) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                  cudaSharedmemCarveoutMaxShared);
        if (const char* error = cuda_error(status, "cudaFuncSetAttribute(carve-out)")) return error;
    }
    if (bytes <= entry->second) return nullptr;
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status == cudaSuccess) entry->second = bytes;
    return cuda_error(status, "cudaFuncSetAttribute(shared memory)");
}

// Nothing is launched for an empty grid. With `pdl` the kernel may start before its predecessor has ended, so it must
// call pdl_wait() (device.cuh). Returns nullptr, or what went wrong.
template <class... A>
const char* launch(void (*kernel)(A...), Blocks blocks, dim3 block, std::size_t shared_bytes, Stream stream, bool pdl,
                   std::common_type_t<A>... arguments)
{
    if (blocks.none()) return nullptr;
    int device = 0, capability = 0;
    if (const char* error = current_capability(device, capability)) return error;
    const void* address = reinterpret_cast<const void*>(kernel);
    if (const char* error = prepare(address, device, shared_bytes)) return error;
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (pdl && capability >= 90) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (blocks.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = blocks.cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        count++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks.grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = attributes;
    config.numAttrs = count;
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
    return cuda_error(cudaLaunchKernelExC(&config, address, pointers), "the launch");
}

#else

template <class... A>
const char* launch(void (*kernel)(A...), Blocks blocks, dim3 block, std::size_t shared_bytes, Stream stream, bool pdl,
                   std::common_type_t<A>... arguments)
{
    if (blocks.none()) return nullptr;
    return emulator::run(blocks.grid, blocks.cluster, block, shared_bytes, stream.handle, pdl, [=] { kernel(arguments...); });
}

#endif

}  // namespace zmqexec
