// Choice of the ISA level at run time.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace di {

// Levels that this build has and this processor can run, best first.
std::vector<std::string> runnable_levels();

// The table in use; the best runnable level until set_level() says otherwise.
const KernelTable& kernels();

// "auto" or a runnable level; throws std::invalid_argument with the list of levels for anything else.
void set_level(const std::string& name);

}  // namespace di
