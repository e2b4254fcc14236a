// A GPU's thread block on the CPU: every thread is a fibre, and between barriers they run in random order. A value read
// before another thread has written it, or a barrier that not all threads reach, shows up as another result for another
// seed, or as a deadlock. Shared memory begins as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace emulator {

class Block;

// What block.h calls a Thread.
class Thread {
 public:
  Thread(Block& block, int index) : block_(block), index_(index) {}
  int index() const { return index_; }
  int64_t block() const;
  char* shared() const;
  void sync() const;
  void sync_warp() const;
  float from_lane(float value, int lane) const;

 private:
  Block& block_;
  int index_;
};

class Block {
 public:
  Block(int threads, size_t shared_bytes, unsigned seed)
      : threads_(threads), fibres_(size_t(threads)), slots_(size_t(threads)), random_(seed),
        shared_((shared_bytes + 15) / 16 * 4 + kCanary, as_float(0x7fffffff)) {}

  void run(int64_t number, const std::function<void(Thread&)>& program) {
    number_ = number;
    std::fill(shared_.begin(), shared_.end(), as_float(0x7fffffff));
    program_ = &program;
    for (int i = 0; i < threads_; ++i) start(i);
    while (step()) {
    }
    for (size_t i = shared_.size() - kCanary; i < shared_.size(); ++i) {
      if (shared_[i] == shared_[i]) throw std::logic_error("written behind the shared memory");
    }
  }

 private:
  friend class Thread;
  enum class State { ready, at_block, at_warp, done };
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::ready;
    Block* block = nullptr;
    int index = 0;
  };
  static constexpr size_t kStack = 256 * 1024, kCanary = 256;

  static float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void start(int i) {
    Fibre& fibre = fibres_[size_t(i)];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    fibre.state = State::ready, fibre.block = this, fibre.index = i;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &scheduler_;
    const uintptr_t address = reinterpret_cast<uintptr_t>(&fibre);  // makecontext passes ints only
    makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(address >> 32), unsigned(address));
  }

  static void enter(unsigned high, unsigned low) {
    Fibre& fibre = *reinterpret_cast<Fibre*>(uintptr_t(high) << 32 | low);
    Thread thread(*fibre.block, fibre.index);
    (*fibre.block->program_)(thread);
    fibre.state = State::done;
  }

  void wait(int i, State state) {
    fibres_[size_t(i)].state = state;
    swapcontext(&fibres_[size_t(i)].context, &scheduler_);
  }

  // Runs one thread, or opens a barrier that all have reached. False when all are done.
  bool step() {
    std::vector<int> ready;
    for (int i = 0; i < threads_; ++i) {
      if (fibres_[size_t(i)].state == State::ready) ready.push_back(i);
    }
    if (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), random_);
      for (int i : ready) swapcontext(&scheduler_, &fibres_[size_t(i)].context);
      return true;
    }
    if (open(0, threads_, State::at_block)) return true;
    bool opened = false;
    for (int warp = 0; warp < threads_; warp += 32) opened |= open(warp, std::min(warp + 32, threads_), State::at_warp);
    if (opened) return true;
    for (const Fibre& fibre : fibres_) {
      if (fibre.state != State::done) throw std::logic_error("deadlock: a barrier that not all threads reach");
    }
    return false;
  }

  bool open(int begin, int end, State barrier) {
    for (int i = begin; i < end; ++i) {
      if (fibres_[size_t(i)].state != barrier) return false;
    }
    for (int i = begin; i < end; ++i) fibres_[size_t(i)].state = State::ready;
    return true;
  }

  int threads_;
  std::vector<Fibre> fibres_;
  std::vector<float> slots_;
  std::mt19937 random_;
  std::vector<float> shared_;
  ucontext_t scheduler_;
  const std::function<void(Thread&)>* program_ = nullptr;
  int64_t number_ = 0;
};

inline int64_t Thread::block() const { return block_.number_; }
inline char* Thread::shared() const { return reinterpret_cast<char*>(block_.shared_.data()); }
inline void Thread::sync() const { block_.wait(index_, Block::State::at_block); }
inline void Thread::sync_warp() const { block_.wait(index_, Block::State::at_warp); }

inline float Thread::from_lane(float value, int lane) const {
  block_.slots_[size_t(index_)] = value;
  sync_warp();
  const float found = block_.slots_[size_t(index_ / 16 * 16 + lane % 16)];
  sync_warp();
  return found;
}

}  // namespace emulator
