/* A PKCS#11 module that passes every call on to a real one (-DTARGET) and differs on request.
 *
 * Each function has a counter of calls, a return code to answer a number of times or until
 * C_Finalize, and a switch that makes it hang. Sessions are counted and may be limited; the user PIN
 * may lock after three wrong tries, with the token's flags saying so; a person may type it at a pad of
 * the token, which takes half a second. A personality is what one
 * vendor's module does otherwise, from manuals and public reports; see the table. It crashes as it is
 * unloaded where FAULT_CRASHES is in the environment (SoftHSM #729).
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

enum { FINALIZE = 1, SLOTS = 4, TOKEN_INFO = 6, MECHANISMS = 7, OPEN = 12, CLOSE = 13, LOGIN = 18,
       READ = 24, FIND = 27, ENCRYPT_INIT = 29, ENCRYPT = 30, DECRYPT_INIT = 33, DECRYPT = 34, GENERATE = 58,
       GENERATE_PAIR = 59, UNWRAP = 61, DERIVE = 62 };

struct mechanism { ul type; void *parameter; ul length; };
struct attribute { ul type; void *value; ul length; };
struct gcm { unsigned char *iv; ul iv_length, iv_bits; void *aad; ul aad_length, tag_bits; };

enum iv { GIVEN, OWN, ZERO, APPENDED }; /* ours; ignored; zeros that are written over; none */
enum value_len { EITHER, REFUSED, WANTED };

static const struct personality {
    const char *name;
    enum iv iv;
    enum value_len value_len; /* CKA_VALUE_LEN in the templates of C_UnwrapKey and C_DeriveKey */
    ul wrong_pin;             /* the answer to a wrong PIN, if not CKR_PIN_INCORRECT */
    ul user;                  /* the type of user that logs in, if not CKU_USER */
    int rigid;                /* refuses usages that are false in a template */
    int one_attribute;        /* refuses C_GetAttributeValue for more than one */
    int stops;                /* C_GetAttributeValue stops at the first that it has not */
    int keeps_operation;      /* an operation whose call failed stays active */
    int write_protected;      /* no read/write session */
    int does_nothing;         /* lists no mechanism */
    int endless;              /* finds the same objects for ever, and has 2^40 slots and mechanisms */
    ul longest_id;            /* bytes of a CKA_ID, if there is a limit */
    long pause;               /* microseconds for each call */
    long pair_pause;          /* microseconds for a key pair */
} personalities[] = {
    {.name = "plain"},
    {.name = "own iv", .iv = OWN},
    {.name = "CloudHSM", .iv = ZERO},
    {.name = "Luna FIPS", .iv = APPENDED, .value_len = REFUSED, .user = 0x80000001},
    {.name = "strict templates", .value_len = WANTED},
    {.name = "ePass2003", .wrong_pin = 0x05, .one_attribute = 1},
    {.name = "tpm2-pkcs11", .rigid = 1, .keeps_operation = 1},
    {.name = "stops", .stops = 1},
    {.name = "write-protected", .write_protected = 1},
    {.name = "does nothing", .does_nothing = 1},
    {.name = "endless", .endless = 1},
    {.name = "short ids", .longest_id = 1},
    {.name = "slow", .pause = 2000, .pair_pause = 1200000},
};

static struct { unsigned char major, minor; fn call[COUNT]; } list, *real;

static atomic_long calls[COUNT], times[COUNT], hang[COUNT], sessions, limit = -1, wrong;
static ul code[COUNT];
static long locks, until_finalize, low;
static char pad[64];
static const struct personality *self = personalities;
static __thread struct { unsigned char iv[12]; struct mechanism how; struct gcm gcm; ul key; int late; } now;
static __thread ul active;

long fault_calls(int i) { return calls[i]; }
void fault_answer(int i, ul rv, long n) { code[i] = rv; times[i] = n; }
void fault_until_finalize(void) { until_finalize = 1; }
void fault_hang(int i, long on) { hang[i] = on; }
long fault_sessions(void) { return sessions; }
void fault_limit(long most) { limit = most; }
void fault_locks(long on) { locks = on; wrong = 0; }
void fault_low(long on) { low = on; }
void fault_pad(const char *pin) { strncpy(pad, pin, sizeof pad - 1); }
int fault_personality(const char *name) {
    for (ul n = 0; n < sizeof personalities / sizeof *personalities; n++)
        if (!strcmp(personalities[n].name, name)) { self = personalities + n; return 1; }
    return 0;
}
void fault_clear(void) {
    for (int i = 0; i < COUNT; i++) { times[i] = 0; hang[i] = 0; calls[i] = 0; }
    limit = -1; locks = 0; wrong = 0; until_finalize = 0; low = 0; *pad = 0; self = personalities;
}

static int has(struct attribute *template, ul count, ul type) {
    for (ul n = 0; n < count; n++) if (template[n].type == type) return 1;
    return 0;
}

static int false_usage(struct attribute *template, ul count) {
    for (ul n = 0; n < count; n++)
        if (template[n].type >= 0x104 && template[n].type <= 0x10C && template[n].length == 1
            && !*(unsigned char *)template[n].value) return 1;
    return 0;
}

static int long_id(struct attribute *template, ul count) {
    for (ul n = 0; n < count; n++)
        if (template[n].type == 0x102 && template[n].length > self->longest_id) return 1;
    return 0;
}

static void fill(unsigned char *iv) {
    for (int n = 0; n < 12; n++) iv[n] = (unsigned char)(1 + rand() % 255);
}

static ul refused(int i, ul a, ul b, ul c, ul d, ul e, ul f, ul g) {
    if (i == OPEN && limit >= 0 && sessions >= limit) return 0xB1;        /* CKR_SESSION_COUNT */
    if (i == OPEN && self->write_protected && (b & 2)) return 0xE2;
    if (i == LOGIN && locks && wrong >= 3) return 0xA4;                   /* CKR_PIN_LOCKED */
    if (i == LOGIN && self->user && b != self->user && b != 2) return 0x103;
    if (i == READ && self->one_attribute && d > 1) return 0x07;
    if (i == GENERATE && self->rigid && false_usage((void *)c, d)) return 0xD1;
    if (i == GENERATE_PAIR && self->rigid && (false_usage((void *)c, d) || false_usage((void *)e, f)))
        return 0xD1;
    if (i == GENERATE && self->longest_id && long_id((void *)c, d)) return 0x13;
    if (i == GENERATE_PAIR && self->longest_id && (long_id((void *)c, d) || long_id((void *)e, f)))
        return 0x13;
    if (i == UNWRAP || i == DERIVE) {
        int there = i == UNWRAP ? has((void *)f, g, 0x161) : has((void *)d, e, 0x161);
        if (self->value_len == REFUSED && there) return 0xD1;
        if (self->value_len == WANTED && !there) return 0xD0;
    }
    if (self->keeps_operation && (i == ENCRYPT_INIT || i == DECRYPT_INIT) && active == a) return 0x90;
    return 0;
}

static ul pass(int i, ul a, ul b, ul c, ul d, ul e, ul f, ul g, ul h) {
    calls[i]++;
    while (hang[i]) usleep(1000);
    if (self->pause) usleep(self->pause);
    if (i == GENERATE_PAIR && self->pair_pause) usleep(self->pair_pause);
    if (i == FINALIZE && until_finalize) for (int n = 0; n < COUNT; n++) times[n] = 0;
    if (times[i]) {
        if (times[i] > 0) times[i]--;
        return code[i];
    }
    ul rv = refused(i, a, b, c, d, e, f, g);
    if (rv) return rv;
    struct mechanism *how = (struct mechanism *)b;
    if ((i == ENCRYPT_INIT || i == DECRYPT_INIT) && how->type == 0x1087) {
        struct gcm *p = how->parameter;
        now.late = 0;
        if (self->iv == ZERO && i == ENCRYPT_INIT) {
            for (ul n = 0; n < p->iv_length; n++) if (p->iv[n]) return 0x71;
            fill(p->iv);
        }
        if (self->iv == OWN && i == ENCRYPT_INIT) fill(p->iv);
        if (self->iv == APPENDED) {
            if (p->iv_length) return 0x71;
            now.late = 1; now.how = *how; now.gcm = *p; now.key = c;
            now.gcm.iv = now.iv; now.gcm.iv_length = 12; now.gcm.iv_bits = 96;
            now.how.parameter = &now.gcm;
            if (i == DECRYPT_INIT) return 0; /* the IV comes with the ciphertext */
            fill(now.iv);
            b = (ul)&now.how;
        }
    }
    if (i == DECRYPT && now.late) {
        memcpy(now.iv, (unsigned char *)b + c - 12, 12);
        rv = real->call[DECRYPT_INIT](a, (ul)&now.how, now.key, 0, 0, 0, 0, 0);
        if (rv) return rv;
        c -= 12;
    }
    if (i == LOGIN && self->user && b == self->user) b = 1;
    if (i == LOGIN && *pad && !c) { usleep(500000); c = (ul)pad; d = strlen(pad); }
    if (i == MECHANISMS && self->does_nothing) { *(ul *)c = 0; return 0; }
    struct attribute kept[16];
    if (i == UNWRAP && self->value_len == WANTED && g <= 16) { /* the module behind wants none */
        ul n = 0;
        for (struct attribute *one = (void *)f; one < (struct attribute *)f + g; one++)
            if (one->type != 0x161) kept[n++] = *one;
        f = (ul)kept; g = n;
    }
    if (i == READ && self->stops) {
        struct attribute *wanted = (void *)c;
        for (ul n = 0; n < d; n++)
            if ((rv = real->call[READ](a, b, (ul)(wanted + n), 1, 0, 0, 0, 0))) return rv;
        return 0;
    }
    rv = real->call[i](a, b, c, d, e, f, g, h);
    if (i == FIND && self->endless) { memset((void *)b, 1, c * sizeof(ul)); *(ul *)d = c; }
    if ((i == SLOTS || i == MECHANISMS) && self->endless) *(ul *)c = 1UL << 40;
    if (i == ENCRYPT && now.late && !rv) {
        memcpy((unsigned char *)d + *(ul *)e, now.iv, 12);
        *(ul *)e += 12;
    }
    if (i == DECRYPT) active = rv ? a : 0;
    if (i == 0 || i == FINALIZE) sessions = 0;
    if (i == OPEN && rv == 0) sessions++;
    if (i == CLOSE && rv == 0) sessions--;
    if (i == LOGIN && locks) wrong = rv == 0xA0 ? wrong + 1 : rv == 0 ? 0 : wrong;
    if (i == LOGIN && rv == 0xA0 && self->wrong_pin) rv = self->wrong_pin;
    if (i == TOKEN_INFO && rv == 0 && *pad) *(ul *)((char *)b + 96) |= 0x100;
    if (i == TOKEN_INFO && rv == 0 && (locks || low)) {
        ul *flags = (ul *)((char *)b + 96);
        *flags &= ~0x70000UL;
        if (wrong || low) *flags |= 0x10000;
        if (wrong == 2) *flags |= 0x20000;
        if (wrong >= 3) *flags |= 0x40000;
    }
    return rv;
}

__attribute__((destructor)) static void unloaded(void) {
    if (getenv("FAULT_CRASHES")) abort();
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
