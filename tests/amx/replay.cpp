// Calls the library as calls.bin has recorded it (amx_emulated.py), and prints a digest of each call's tensors after
// it; with tiles, also what itm_tiles() finds.
#include <malloc.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "functions.h"

extern const unsigned char CALLS[];
__asm__(".section .rodata\n.balign 64\n.globl CALLS\nCALLS:\n.incbin \"calls.bin\"\n.text\n");
#if defined(__AMX_BF16__)
extern "C" const char* itm_tiles();
#endif

int main() {
  mallopt(M_MMAP_MAX, 0);  // memory that is mapped is not had back from loader.c
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const unsigned char* at = CALLS;
  const auto number = [&] {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    at += sizeof value;
    return value;
  };
  for (uint64_t left = number(); left; --left) {
    const uint64_t function = number();
    std::vector<uint64_t> call(number()), bytes(number());
    for (auto& word : call) word = number();
    for (auto& size : bytes) size = number();
    std::vector<unsigned char*> tensors;
    for (uint64_t size : bytes) {
      tensors.push_back(static_cast<unsigned char*>(std::aligned_alloc(64, (size + 191) / 64 * 64)));
      std::memcpy(tensors.back(), at, size);
      at += (size + 7) / 8 * 8;
    }
    for (uint64_t pointers = number(); pointers; --pointers) {
      const uint64_t word = number();
      call[word] = reinterpret_cast<uint64_t>(tensors[number()]);
    }
    if (const char* said = FUNCTIONS[function].run(call.data())) {
      std::printf("%s: %s\n", FUNCTIONS[function].name, said);
      return 1;
    }
    std::printf("%s", FUNCTIONS[function].name);
    for (size_t k = 0; k < tensors.size(); ++k) {
      uint64_t digest = 14695981039346656037u;
      for (uint64_t i = 0; i < bytes[k]; ++i) digest = (digest ^ tensors[k][i]) * 1099511628211u;
      std::printf(" %016lx", digest);
      std::free(tensors[k]);
    }
    std::printf("\n");
  }
#if defined(__AMX_BF16__)
  std::printf("itm_tiles: ");  // its child, which here is this process itself, adds y where products are right
  std::fflush(stdout);
  if (const char* said = itm_tiles()) std::printf("%s\n", said);
#endif
}
