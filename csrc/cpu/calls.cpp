// itm_calls refuses a library whose structs (calls/) differ from those of the Python that loads it, by Python's hash.
//
// Each struct holds an op's arguments, results, gradients and sizes, and is taken by the exported functions <op>(call)
// and <op>_backward(call), or by the one of them that C++ has. They return nullptr, or an error as a sentence that
// stays valid until the thread's next call. All tensors are contiguous, in host memory, owned by the caller and alive
// during the call; C++ keeps no pointer to them. Forward writes every element of the results; `grad` and d_... are null
// then. Backward reads `grad`, and adds to or writes the d_... that are not null; the function says which.
#include <cstring>

#include "calls/digest.h"
#include "threads.h"

extern "C" const char* itm_calls(const char* digest) {
  return std::strcmp(digest, CALLS) == 0
             ? nullptr
             : "csrc/cpu/calls does not follow the ops' declarations: run `python -m itm_fast.ops._calls`";
}

// Says that this process is a forked child (threads.h).
extern "C" void itm_forked() { itm_fast::forked = true; }
