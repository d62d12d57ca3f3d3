// Memory that several GPUs, or a GPU and the host, see at once. Not of torch's pool, whose memory may be unexportable.
//
// It is the current device's of the calling thread. In the emulator it is a memfd, so that real processes share it.
#include "peer_memory.h"

#include <cstring>

#include "launch.h"

#ifndef __CUDACC__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#endif

namespace zmqexec {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 34;

#ifdef __CUDACC__

// Smaller allocations share a block of this size, and CUDA IPC opens whole blocks to the other process.
constexpr int64_t kBlockBytes = int64_t{2} << 20;

#else

// device pointer -> file descriptor (-1: a peer's) and size
std::map<void*, std::pair<int, int64_t>>& mappings()
{
    static std::map<void*, std::pair<int, int64_t>> all;
    return all;
}

const char* system_error(const char* what)
{
    return error_text(std::string(what) + ": " + std::strerror(errno));
}

const char* map_file(int fd, int64_t bytes, int64_t& pointer, int kept_fd)
{
    void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) return system_error("mmap");
    mappings()[memory] = {kept_fd, bytes};
    pointer = reinterpret_cast<int64_t>(memory);
    return nullptr;
}

const char* unmap(void* pointer)
{
    auto found = mappings().find(pointer);
    check_argument(found != mappings().end(), "no such address");
    munmap(pointer, static_cast<std::size_t>(found->second.second));
    if (found->second.first >= 0) close(found->second.first);
    mappings().erase(found);
    return nullptr;
}

#endif

}  // namespace

#ifdef __CUDACC__

const char* fill_device(void* device, int byte, int64_t bytes)
{
    cudaError_t status = cudaMemset(device, byte, static_cast<std::size_t>(bytes));
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    return cuda_error(status, "cudaMemset");
}

const char* write_device(void* device, const void* host, int64_t bytes)
{
    cudaError_t status = cudaMemcpy(device, host, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice);
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    return cuda_error(status, "cudaMemcpy");
}

#else

const char* fill_device(void* device, int byte, int64_t bytes)
{
    std::memset(device, byte, static_cast<std::size_t>(bytes));
    return nullptr;
}

const char* write_device(void* device, const void* host, int64_t bytes)
{
    std::memcpy(device, host, static_cast<std::size_t>(bytes));
    return nullptr;
}

#endif

static const char* ipc_alloc(int64_t bytes, int64_t& pointer)
{
    check_argument(bytes > 0 && bytes <= kMostBytes, "bytes: from 1 to 16 GiB");
#ifdef __CUDACC__
    void* memory = nullptr;
    const int64_t whole = divide_up(bytes, kBlockBytes) * kBlockBytes;
    const cudaError_t status = cudaMalloc(&memory, static_cast<std::size_t>(whole));
    if (const char* error = cuda_error(status, "cudaMalloc")) return error;
    if (const char* error = fill_device(memory, 0, whole)) {
        cudaFree(memory);
        return error;
    }
    pointer = reinterpret_cast<int64_t>(memory);
    return nullptr;
#else
    const int fd = memfd_create("zmqexec-emulated-device", MFD_CLOEXEC);
    if (fd < 0) return system_error("memfd_create");
    const char* error = ftruncate(fd, bytes) == 0 ? map_file(fd, bytes, pointer, fd) : system_error("ftruncate");
    if (error != nullptr) close(fd);
    return error;
#endif
}
BINDING(ipc_alloc, "ipc_alloc(bytes)\n\nThe address of zeroed memory on the current device, until device_free.")

static const char* device_free(void* pointer)
{
#ifdef __CUDACC__
    return cuda_error(cudaFree(pointer), "cudaFree");
#else
    return unmap(pointer);
#endif
}
BINDING(device_free, "device_free(pointer)\n\nWaits for the device.")

static const char* ipc_handle(void* pointer, std::string& handle)
{
#ifdef __CUDACC__
    cudaIpcMemHandle_t whole;
    if (const char* error = cuda_error(cudaIpcGetMemHandle(&whole, pointer), "cudaIpcGetMemHandle")) return error;
    handle.assign(reinterpret_cast<const char*>(&whole), sizeof whole);
#else
    auto found = mappings().find(pointer);
    check_argument(found != mappings().end(), "no such address");
    handle = std::to_string(getpid()) + " " + std::to_string(found->second.first) + " " +
             std::to_string(found->second.second);
#endif
    return nullptr;
}
BINDING(ipc_handle,
        "ipc_handle(pointer)\n\nBytes with which another process of this host can ipc_open memory of ipc_alloc.")

static const char* ipc_open(const std::string& handle, int64_t& pointer)
{
#ifdef __CUDACC__
    cudaIpcMemHandle_t whole;
    check_argument(handle.size() == sizeof whole, "no handle of ipc_handle");
    std::memcpy(&whole, handle.data(), sizeof whole);
    void* memory = nullptr;
    cudaError_t status = cudaIpcOpenMemHandle(&memory, whole, cudaIpcMemLazyEnablePeerAccess);
    pointer = reinterpret_cast<int64_t>(memory);
    return cuda_error(status, "cudaIpcOpenMemHandle");
#else
    int pid = 0, fd = 0;
    long long bytes = 0;
    check_argument(std::sscanf(handle.c_str(), "%d %d %lld", &pid, &fd, &bytes) == 3, "no handle of ipc_handle");
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
    const int opened = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (opened < 0) return system_error(path.c_str());
    const char* error = map_file(opened, bytes, pointer, -1);
    close(opened);
    return error;
#endif
}
BINDING(ipc_open,
        "ipc_open(handle)\n\n"
        "The address here of another process's memory, until ipc_close; the current device must reach that device.")

static const char* ipc_close(void* pointer)
{
#ifdef __CUDACC__
    return cuda_error(cudaIpcCloseMemHandle(pointer), "cudaIpcCloseMemHandle");
#else
    return unmap(pointer);
#endif
}
BINDING(ipc_close, "ipc_close(pointer)\n\nBefore the owner frees the memory.")

static const char* host_mapped_alloc(int64_t bytes, std::vector<int64_t>& pointers)
{
    check_argument(bytes > 0 && bytes <= kMostBytes, "bytes: from 1 to 16 GiB");
    void *host = nullptr, *device = nullptr;
#ifdef __CUDACC__
    const unsigned flags = cudaHostAllocMapped | cudaHostAllocPortable;
    cudaError_t status = cudaHostAlloc(&host, static_cast<std::size_t>(bytes), flags);
    if (status == cudaSuccess) status = cudaHostGetDevicePointer(&device, host, 0);
    if (const char* error = cuda_error(status, "cudaHostAlloc")) {
        if (host != nullptr) cudaFreeHost(host);
        return error;
    }
    std::memset(host, 0, static_cast<std::size_t>(bytes));
#else
    host = device = std::calloc(1, static_cast<std::size_t>(bytes));
    if (host == nullptr) return "out of memory";
#endif
    pointers = {reinterpret_cast<int64_t>(host), reinterpret_cast<int64_t>(device)};
    return nullptr;
}
BINDING(host_mapped_alloc,
        "host_mapped_alloc(bytes)\n\n"
        "(the host's address, the device's) of zeroed, page-locked host memory that kernels can read and write.")

static const char* host_mapped_free(void* host)
{
#ifdef __CUDACC__
    return cuda_error(cudaFreeHost(host), "cudaFreeHost");
#else
    std::free(host);
    return nullptr;
#endif
}
BINDING(host_mapped_free, "host_mapped_free(host)\n\nWaits for the device.")

static const char* use_device(int device)
{
#ifdef __CUDACC__
    return cuda_error(cudaSetDevice(device), "cudaSetDevice");
#else
    check_argument(device >= 0, "devices are numbered from 0");
    return nullptr;
#endif
}
BINDING(use_device,
        "use_device(device)\n\n"
        "Make it the calling thread's current device. This module has a CUDA runtime of its own, which should not have to\n"
        "learn from the driver what torch's has set.")

static const char* can_access_peer(int device, int peer, int64_t& can)
{
#ifdef __CUDACC__
    int answer = 0;
    cudaError_t status = cudaDeviceCanAccessPeer(&answer, device, peer);
    can = answer;
    return cuda_error(status, "cudaDeviceCanAccessPeer");
#else
    check_argument(device >= 0 && peer >= 0, "devices are numbered from 0");
    can = 1;
    return nullptr;
#endif
}
BINDING(can_access_peer,
        "can_access_peer(device, peer)\n\n1 if kernels on `device` can read and write the memory of `peer`, else 0.")

}  // namespace zmqexec
