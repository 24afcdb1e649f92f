// Whether the structs of this library are those of the Python that loads it.
#include <cstring>

#include "calls.h"

extern "C" const char* itm_calls(const char* digest) {
  return std::strcmp(digest, itm_fast::CALLS) == 0
             ? nullptr
             : "csrc/cpu/calls.h does not follow the ops' declarations: run `python -m itm_fast.ops._calls`";
}
