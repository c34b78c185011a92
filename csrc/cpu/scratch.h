// Working memory of a call.
#pragma once

#include <cstddef>

namespace peftkern {

// At least `bytes`, 64-byte aligned, uninitialised; the calling thread's, valid until its next call. The
// memory is kept for the next call; beyond 64 MiB it is given back by the first call that needs less. Throws
// std::bad_alloc.
//
//   scratch            a kernel calls this once, before its parallel region, and shares the result out
//   operand_scratch    for a matrix that one kernel writes and the next ones read
void* scratch(size_t bytes);
void* operand_scratch(size_t bytes);

}  // namespace peftkern
