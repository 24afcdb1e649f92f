// Whether this processor's tiles compute what PlainTiles do: asked once per process, before the first real product.
#if defined(__AMX_BF16__)
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pack.h"

namespace itm_fast {
namespace {

// Every shape of a block, and depths that are no whole tile.
constexpr int64_t M = 28, N = 48, K = 37;

// The product of small whole numbers, exact in any order, from C = 1 on.
template <class Multiply>
void product(float* c, Multiply multiply) {
  Pair a[K * M], b[K * N];
  uint32_t state = 1;
  const auto draw = [&] { return narrow_bfloat16(float(int((state = state * 1664525 + 1013904223) >> 28) - 8)); };
  for (Pair& pair : a) pair.bits = draw() | draw() << 16;
  for (Pair& pair : b) pair.bits = draw() | draw() << 16;
  multiply(Left<Pair>{a, M}, Right<Pair>{b, N}, [](int64_t, int64_t) { return splat(1.f); },
           [=](int64_t i, int64_t j, Vec<float> v) { store(c + i * N + j, v); });
}

}  // namespace
}  // namespace itm_fast

// Runs in a process of its own, as a processor or an emulator that does not know an instruction ends it.
extern "C" const char* itm_tiles() {
  using namespace itm_fast;
  return guarded([] {
    float right[M * N];
    product(right, [](auto... given) { multiply_by_tiles(PlainTiles(TileShapes()), M, N, K, given...); });
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("no process could be started to try them in");
    if (!child) {
      for (int number : {SIGILL, SIGSEGV, SIGBUS}) signal(number, SIG_DFL);  // not what this process does then
      float found[M * N];
      product(found, [](auto... given) { gemm<Pair>(M, N, K, given...); });
      _exit(std::memcmp(found, right, sizeof right) ? 1 : 0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
      if (errno != EINTR) throw std::runtime_error("the process that tried them is lost");
    if (WIFSIGNALED(status))
      throw std::runtime_error("they end a process with signal " + std::to_string(WTERMSIG(status)));
    if (status) throw std::runtime_error("their products are wrong");
  });
}
#endif
