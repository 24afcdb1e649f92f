// Threads over parts of the work, memory that frees itself, and errors as sentences.
#pragma once
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
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
  explicit Buffer(int64_t n = 0) : Buffer(Unwritten(), n) { std::memset(static_cast<void*>(data_), 0, bytes(n)); }
  static Buffer zeros(int64_t n, int64_t threads);  // the same, written by all threads
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator E*() const { return data_; }

 private:
  struct Unwritten {};
  Buffer(Unwritten, int64_t n) : data_(static_cast<E*>(std::aligned_alloc(64, bytes(n)))) {
    if (!data_) throw std::bad_alloc();
  }
  static size_t bytes(int64_t n) { return size_t(round_up(n * int64_t(sizeof(E)) + 128, 64)); }

  E* data_;
};

// Whether this process is a forked child: the threads of its parent's OpenMP library do not exist in it, and a loop
// would wait for them. Set here by a fork after the library was loaded; of earlier ones Python tells (itm_forked).
inline std::atomic<bool> forked{false};
inline const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// GNU OpenMP's function that runs another on so many threads, of the library that torch has loaded; null without one.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline OpenMP openmp() {
  static const auto found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

inline thread_local int64_t had = 1;  // the most threads that loops of this thread have had, at once

// Runs body on so many threads, this one among them, or on fewer if no more can be had or there are fewer parts. They
// are those of torch's own loops: these spin after a loop, and would share the cores with threads made here. All are
// called, as OpenMP ends those that a loop leaves out. OpenMP ends the process if it cannot make a thread, so the first
// loop of so many in a thread makes them here, and OpenMP is asked for as many only once these could all be made.
template <class Body>
void on_threads(int64_t parts, int64_t threads, Body& body) {
  const OpenMP run = least(threads, parts) > 1 ? openmp() : nullptr;
  if (run && threads <= had)
    return run([](void* of) { (*static_cast<Body*>(of))(); }, &body, unsigned(threads), 0);
  std::vector<std::thread> others;
  std::mutex gate;  // closed until all are made, so that none has ended before the last begins
  {
    const std::lock_guard<std::mutex> closed(gate);
    try {
      const int64_t count = run ? threads : least(threads, parts);
      for (int64_t k = 1; k < count; ++k)
        others.emplace_back([&] {
          gate.lock();
          gate.unlock();
          body();
        });
      had = std::max(had, count);
    } catch (const std::exception&) {
      // Fewer threads than asked for still do all the parts.
    }
  }
  body();
  for (auto& thread : others) thread.join();
}

// Runs worker(part) for every part, each thread with its own worker from make(). Which thread takes which part is not
// determined, so a part's result must not depend on the parts that its worker ran before.
template <class Make>
void parallel(int64_t parts, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto run = [&] {
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
#if defined(__AMX_BF16__)
    AmxTiles::release();
#endif
  };
  on_threads(parts, threads, run);
  if (failure) std::rethrow_exception(failure);
}

template <class E>
Buffer<E> Buffer<E>::zeros(int64_t n, int64_t threads) {
  constexpr int64_t PART = 1 << 20;
  Buffer all(Unwritten(), n);
  const int64_t size = int64_t(bytes(n));
  parallel((size + PART - 1) / PART, threads, [&] {
    return [&](int64_t k) {
      std::memset(reinterpret_cast<char*>(all.data_) + k * PART, 0, size_t(least(PART, size - k * PART)));
    };
  });
  return all;
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
