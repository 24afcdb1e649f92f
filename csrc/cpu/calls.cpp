// Refuses a library whose structs (calls.h) differ from those of the Python that loads it. `digest` is Python's hash.
#include <cstring>

#include "calls.h"

extern "C" const char* itm_calls(const char* digest) {
  return std::strcmp(digest, itm_fast::CALLS) == 0
             ? nullptr
             : "csrc/cpu/calls.h does not follow the ops' declarations: run `python -m itm_fast.ops._calls`";
}
