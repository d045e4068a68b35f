/* Packs its standard input. */
#include <stdio.h>
#include <zlib.h>

int main(void)
{
    char buffer[4096];
    size_t count;
    gzFile out = gzdopen(1, "wb9");

    if (out == NULL)
        return 1;
    while ((count = fread(buffer, 1, sizeof buffer, stdin)) > 0)
        if (gzwrite(out, buffer, count) != (int)count)
            return 1;
    return ferror(stdin) || gzclose(out) != Z_OK;
}
