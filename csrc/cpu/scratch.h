// Working memory of a kernel call.
#pragma once

#include <cstddef>

namespace peftkern {

// At least `bytes`, 64-byte aligned, uninitialised; the calling thread's, valid until its next call. A kernel
// calls this once, before its parallel region, and shares the result out. The memory is kept for the next
// call; beyond 64 MiB it is given back by the first call that needs less. Throws std::bad_alloc.
void* scratch(size_t bytes);

}  // namespace peftkern
