// CHECK(condition) << what to say; failures are counted, and main returns failures().
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace check {

inline int& failed() {
  static int count = 0;
  return count;
}

class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": " << condition << " is false: ";
  }
  ~Failure() {
    if (++failed() <= 20) std::fprintf(stderr, "%s\n", text_.str().c_str());
  }
  template <class T>
  Failure& operator<<(const T& value) {
    text_ << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

// The exit code of a test: 0 when all checks held.
inline int result(const char* name) {
  if (failed()) {
    std::fprintf(stderr, "%s: %d checks failed\n", name, failed());
    return 1;
  }
  std::printf("%s: passed\n", name);
  return 0;
}

}  // namespace check

#define CHECK(condition) \
  if (condition) {       \
  } else                 \
    check::Failure(__FILE__, __LINE__, #condition)
