/* Stands in for the CUDA runtime that compiled CuTe DSL host code calls: every symbol hands its arguments to one
   function of the emulator, by its place in runtime.SYMBOLS. Built with -DSYMBOLS="ENTRY(0, name) ENTRY(1, name) ..." */

typedef long (*emulator_call_t)(long index, const long *arguments);

emulator_call_t ptx_emulator_call = 0;

static long enter(long index, const long *arguments) {
    return ptx_emulator_call ? ptx_emulator_call(index, arguments) : 999;
}

#define ENTRY(index, name)                                                                                             \
    int name(long a, long b, long c, long d, long e, long f, long g, long h, long i, long j,                           \
             long k, long l) {                                                                                         \
        const long arguments[] = {a, b, c, d, e, f, g, h, i, j, k, l};                                                 \
        return (int)enter(index, arguments);                                                                           \
    }

SYMBOLS
