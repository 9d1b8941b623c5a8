#ifdef __x86_64__
#define NEQ_ISA avx512
#define NEQ_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define NEQ_REGISTER_BYTES 64
#define NEQ_VECTOR_SHUFFLES
#include "table.h"
#endif
