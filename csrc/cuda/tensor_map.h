// The matrix that hopper.cuh's load_box copies from, described on the host.
#pragma once

#include "hopper.cuh"
#include "launch.h"

namespace zmqexec {

constexpr int BOX_COLUMNS = 64;  // 128 bytes, the widest that is swizzled

// Of a matrix [rows, columns] of 16-bit elements, 16-aligned as its row_stride (in elements) makes its rows.
#ifdef __CUDACC__

inline const char* make_tensor_map(TensorMap& map, const void* base, int64_t rows, int64_t columns, int64_t row_stride,
                                   int box_rows)
{
    static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    if (encode == nullptr) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                              cudaEnableDefault, &found);
#else
        cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        if (const char* error = cuda_error(status, "cudaGetDriverEntryPoint")) return error;
        if (found != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12";
        encode = reinterpret_cast<decltype(encode)>(function);
    }
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(2 * row_stride)};
    const cuuint32_t box[2] = {BOX_COLUMNS, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(base), sizes, row_bytes, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return nullptr;
    return error_text("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)) + " for a matrix of " +
                      std::to_string(rows) + " rows of " + std::to_string(columns) + ", " + std::to_string(row_stride) +
                      " apart, in boxes of " + std::to_string(box_rows) + " rows");
}

#else

inline const char* make_tensor_map(TensorMap& map, const void* base, int64_t rows, int64_t columns, int64_t row_stride,
                                   int box_rows)
{
    map = {static_cast<const unsigned char*>(base), rows, columns, 2 * row_stride, box_rows, BOX_COLUMNS};
    return nullptr;
}

#endif

}  // namespace zmqexec
