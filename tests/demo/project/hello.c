/* Says who it is and what was packed. */
#include <stdio.h>
#include <zlib.h>

#define VERSION "1"

int main(void)
{
    char words[256];
    gzFile in = gzopen("/usr/share/hello/words.gz", "rb");

    if (in == NULL || gzgets(in, words, sizeof words) == NULL) {
        fprintf(stderr, "hello: no words\n");
        return 1;
    }
    printf("hello %s, zlib %s: %s", VERSION, zlibVersion(), words);
    return gzclose(in) != Z_OK;
}
