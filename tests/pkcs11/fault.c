/* A PKCS#11 module that passes every call on to a real one (-DTARGET) and fails on request.
 *
 * Each function has a counter of calls, a return code to answer a number of times, and a switch that
 * makes it hang. Sessions are counted and may be limited; the user PIN may lock after three wrong
 * tries, with the token's flags saying so; AES-GCM may use an IV of the token's own making.
 * Arguments are all of register size, so eight are passed on whatever the function takes.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ul;
typedef ul (*fn)(ul, ul, ul, ul, ul, ul, ul, ul);
#define COUNT 68

static struct { unsigned char major, minor; fn call[COUNT]; } list, *real;

static atomic_long calls[COUNT], times[COUNT], hang[COUNT], sessions, limit = -1, wrong;
static ul code[COUNT];
static long locks, own_iv;

long fault_calls(int i) { return calls[i]; }
void fault_answer(int i, ul rv, long n) { code[i] = rv; times[i] = n; }
void fault_hang(int i, long on) { hang[i] = on; }
long fault_sessions(void) { return sessions; }
void fault_limit(long most) { limit = most; }
void fault_locks(long on) { locks = on; wrong = 0; }
void fault_own_iv(long on) { own_iv = on; }
void fault_clear(void) {
    for (int i = 0; i < COUNT; i++) { times[i] = 0; hang[i] = 0; calls[i] = 0; }
    limit = -1; locks = 0; wrong = 0; own_iv = 0;
}

struct mechanism { ul type; void *parameter; ul length; };
struct gcm { unsigned char *iv; ul iv_length; };

static ul pass(int i, ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) {
    calls[i]++;
    while (hang[i]) usleep(1000);
    if (times[i]) {
        if (times[i] > 0) times[i]--;
        return code[i];
    }
    if (i == 12 && limit >= 0 && sessions >= limit) return 0xB1; /* CKR_SESSION_COUNT */
    if (i == 18 && locks && wrong >= 3) return 0xA4;             /* CKR_PIN_LOCKED */
    if (i == 29 && own_iv) {
        struct mechanism *m = (struct mechanism *)b;
        if (m->type == 0x1087) {
            struct gcm *p = m->parameter;
            for (ul n = 0; n < p->iv_length; n++) p->iv[n] = (unsigned char)(rand() & 0xff);
        }
    }
    ul rv = real->call[i](a, b, c, d, e, f, g, h);
    if (i == 0 || i == 1) sessions = 0;
    if (i == 12 && rv == 0) sessions++;
    if (i == 13 && rv == 0) sessions--;
    if (i == 18 && locks) wrong = rv == 0xA0 ? wrong + 1 : rv == 0 ? 0 : wrong;
    if (i == 6 && rv == 0 && locks) {
        ul *flags = (ul *)((char *)b + 96);
        *flags &= ~0x70000UL;
        if (wrong) *flags |= 0x10000;
        if (wrong == 2) *flags |= 0x20000;
        if (wrong >= 3) *flags |= 0x40000;
    }
    return rv;
}

#define W(n) static ul w##n(ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) { \
    return pass(n, a, b, c, d, e, f, g, h); }
#define ALL(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) \
    X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) \
    X(32) X(33) X(34) X(35) X(36) X(37) X(38) X(39) X(40) X(41) X(42) X(43) X(44) X(45) X(46) \
    X(47) X(48) X(49) X(50) X(51) X(52) X(53) X(54) X(55) X(56) X(57) X(58) X(59) X(60) X(61) \
    X(62) X(63) X(64) X(65) X(66) X(67)
ALL(W)

ul C_GetFunctionList(void **out) {
    if (!real) {
        void *library = dlopen(TARGET, RTLD_NOW | RTLD_LOCAL);
        if (!library) return 5;
        ul (*get)(void **) = (ul (*)(void **))dlsym(library, "C_GetFunctionList");
        void *found = NULL;
        ul rv = get ? get(&found) : 5;
        if (rv) return rv;
        list.major = ((unsigned char *)found)[0];
        list.minor = ((unsigned char *)found)[1];
#define SET(n) list.call[n] = w##n;
        ALL(SET)
        real = found;
    }
    *out = &list;
    return 0;
}
