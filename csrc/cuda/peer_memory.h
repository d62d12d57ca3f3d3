// Device memory of our own, which other processes can map, as peer_memory.cu gives it to Python.
#pragma once

#include <cstdint>

namespace zmqexec {

// Both return nullptr or what went wrong, and only when the memory holds the new bytes.
const char* fill_device(void* device, int byte, int64_t bytes);
const char* write_device(void* device, const void* host, int64_t bytes);

}  // namespace zmqexec
