#include "cpu/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peftkern {

#if defined(MADV_HUGEPAGE)

namespace {

constexpr uintptr_t kPage = uintptr_t{2} << 20;

// The whole pages of 2 MiB within [data, data + bytes).
void advise(void* data, size_t bytes, int advice) {
  if (bytes < 2 * kPage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }

void renew_pages(void* data, size_t bytes) {
  advise(data, bytes, MADV_DONTNEED);
  advise(data, bytes, MADV_HUGEPAGE);
}

#else

void prefer_huge_pages(void*, size_t) {}
void renew_pages(void*, size_t) {}

#endif

}  // namespace peftkern
