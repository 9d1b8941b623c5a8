#ifdef __x86_64__
#define NEQ_ISA avx2
#define NEQ_TARGET __attribute__((target("avx2,fma")))
#define NEQ_REGISTER_BYTES 32
#define NEQ_VECTOR_SHUFFLES
#include "table.h"
#endif
