// Threads over parts of the work, memory that frees itself, and errors as sentences.
#pragma once
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "gemm.h"

namespace itm_fast {

// Zeros, on a cache line's boundary, with a vector's room beyond the end for loads that pass it.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) {
    const size_t bytes = size_t(round_up(n * int64_t(sizeof(E)) + 128, 64));
    data_ = static_cast<E*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator E*() const { return data_; }

 private:
  E* data_;
};

// Runs worker(part) for every part, each thread with its own worker from make(). Which thread takes which part is not
// determined, so a part's result must not depend on the parts that its worker ran before.
template <class Make>
void parallel(int64_t parts, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto run = [&] {
    try {
      if (next < parts) {
        auto worker = make();
        for (int64_t part; (part = next++) < parts;) worker(part);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
      next = parts;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t k = 1; k < least(threads, parts); ++k) others.emplace_back(run);
  } catch (const std::exception&) {
    // Fewer threads than asked for still do all the parts.
  }
  run();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// What an exported function returns: nullptr, or a sentence that stays valid until the thread's next call.
template <class Body>
const char* guarded(Body body) {
  thread_local std::string sentence;
#if defined(__AMX_BF16__)
  const struct Release {
    ~Release() { AmxTiles::release(); }
  } at_the_end;
#endif
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    sentence = "out of memory in a CPU kernel; close other programs or score smaller blocks";
  } catch (const std::exception& error) {
    sentence = error.what();
  }
  return sentence.c_str();
}

}  // namespace itm_fast
