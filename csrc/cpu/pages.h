// Where a large output's pages come from.
#pragma once

#include <cstddef>

namespace peftkern {

// Asks for huge pages under [data, data + bytes). Writing a freshly allocated 32 MB tensor for the first time
// takes 8192 page faults, which cost more than what is computed; with huge pages it takes 16. A hint without
// effect on memory that is in use already; nothing below 4 MiB.
void prefer_huge_pages(void* data, size_t bytes);

// The same for memory whose contents nobody wants any more: the pages that the allocator left there go first,
// so that a recycled block gets huge ones too. For what is read for long, not for what comes and goes.
void renew_pages(void* data, size_t bytes);

}  // namespace peftkern
