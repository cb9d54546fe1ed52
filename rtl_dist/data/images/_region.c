/* Decodes a rectangle of a JPEG, to the pixels that decoding it whole and cropping would give.
 *
 * header() takes only plain baseline files whose whole decode cannot fail behind the rectangle;
 * decode_region() gives up on every error and warning of libjpeg. The caller then decodes the whole
 * file by its usual decoder, so that pixels and refusals are the same with and without this module.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 1005000
#error "needs libjpeg-turbo 1.5 or newer"
#endif

/* Fancy upsampling looks one chroma sample, so at most two pixels, beyond what it makes. */
#define REACH 2

typedef struct {
    const unsigned char *bytes;
    size_t size;
} span;

/* ---- what a file is ------------------------------------------------------------------------ */

static unsigned read16(const unsigned char *at, int little_endian)
{
    return little_endian ? at[0] | at[1] << 8 : at[0] << 8 | at[1];
}

/* Whether an APP1 segment certainly does not turn the image. */
static int is_upright(span segment)
{
    const size_t prefix = 6, entry_size = 12;
    const unsigned orientation_tag = 0x0112;
    if (segment.size <= prefix)
        return 1;
    if (segment.size < prefix + 2)
        return 0;
    const unsigned char *tiff = segment.bytes + prefix;
    size_t size = segment.size - prefix;
    int little_endian = tiff[0] == 'I' && tiff[1] == 'I';
    if (!little_endian && !(tiff[0] == 'M' && tiff[1] == 'M'))
        return memcmp(segment.bytes, "Exif", 4) != 0;
    if (size < 8)
        return 0;
    unsigned low = read16(tiff + (little_endian ? 4 : 6), little_endian);
    unsigned high = read16(tiff + (little_endian ? 6 : 4), little_endian);
    size_t at = (size_t)high << 16 | low;
    if (at > size - 2)
        return 0;
    size_t entries = read16(tiff + at, little_endian);
    at += 2;
    if (entries * entry_size > size - at)
        return 0;
    for (size_t entry = 0; entry < entries; entry++, at += entry_size)
        if (read16(tiff + at, little_endian) == orientation_tag
            && read16(tiff + at + 8, little_endian) != 1)
            return 0;
    return 1;
}

/* Whether a frame header is of a kind decoded here: 8 bits; grey, 4:4:4, 4:2:2 or 4:2:0. */
static int is_plain_frame(span segment)
{
    const unsigned char *frame = segment.bytes;
    if (segment.size < 6 || frame[0] != 8)
        return 0;
    unsigned components = frame[5];
    if ((components != 1 && components != 3) || segment.size != 6 + 3 * (size_t)components)
        return 0;
    unsigned luma = frame[7];
    if (components == 1)
        return luma == 0x11;
    return (luma == 0x11 || luma == 0x21 || luma == 0x22) && frame[10] == 0x11 && frame[13] == 0x11;
}

/* Whether coded data goes on, through nothing but restart markers, to the end-of-image marker:
 * then libjpeg meets no error in it, whatever else is damaged. */
static int reaches_end_of_image(const unsigned char *at, const unsigned char *end)
{
    while (at < end && (at = memchr(at, 0xFF, end - at)) != NULL) {
        while (at < end && *at == 0xFF)
            at++;
        if (at == end)
            return 0;
        unsigned marker = *at++;
        if (marker == 0xD9)
            return 1;
        if (marker != 0 && !(marker >= 0xD0 && marker <= 0xD7))
            return 0;
    }
    return 0;
}

/* Width and height of a file that can be decoded by region; 0 for every other. */
static int inspect(span file, unsigned *width, unsigned *height)
{
    const unsigned char *at = file.bytes, *end = file.bytes + file.size;
    unsigned components = 0;
    if (file.size < 4 || at[0] != 0xFF || at[1] != 0xD8)
        return 0;
    at += 2;
    while (end - at >= 4 && at[0] == 0xFF) {
        unsigned marker = at[1];
        size_t length = read16(at + 2, 0);
        if (length < 2 || length > (size_t)(end - at - 2))
            return 0;
        span segment = {at + 4, length - 2};
        at += 2 + length;
        if (marker == 0xC0 || marker == 0xC1) { /* baseline and extended sequential, Huffman */
            if (components || !is_plain_frame(segment))
                return 0;
            *height = read16(segment.bytes + 1, 0);
            *width = read16(segment.bytes + 3, 0);
            components = segment.bytes[5];
        } else if (marker == 0xDA) { /* one scan of all the components */
            return components && *width && *height && segment.size && segment.bytes[0] == components
                   && reaches_end_of_image(at, end);
        } else if (marker == 0xE1) {
            if (!is_upright(segment))
                return 0;
        } else if (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker != 0xFE
                   && !(marker >= 0xE0 && marker <= 0xEF)) {
            return 0;
        }
    }
    return 0;
}

/* ---- decoding ------------------------------------------------------------------------------ */

typedef struct {
    struct jpeg_decompress_struct image;
    struct jpeg_error_mgr errors;
    jmp_buf give_up;
    span file;
    JDIMENSION top, left, height, width;
    int channels;
    unsigned char *pixels;
} job;

enum outcome { GAVE_UP, DECODED, OUT_OF_RANGE };

static void give_up(j_common_ptr image)
{
    longjmp(((job *)image->client_data)->give_up, 1);
}

static void give_up_on_warnings(j_common_ptr image, int level)
{
    if (level < 0)
        give_up(image);
}

static void say_nothing(j_common_ptr image)
{
    (void)image;
}

static enum outcome decode_or_jump(job *job)
{
    j_decompress_ptr image = &job->image;
    if (setjmp(job->give_up))
        return GAVE_UP;
    jpeg_create_decompress(image);
    jpeg_mem_src(image, (unsigned char *)job->file.bytes, job->file.size);
    jpeg_read_header(image, TRUE);
    if (job->left > image->image_width || job->width > image->image_width - job->left
        || job->top > image->image_height || job->height > image->image_height - job->top)
        return OUT_OF_RANGE;
    if (image->progressive_mode || image->num_components > 3) /* libjpeg would hold all of it */
        return GAVE_UP;
    image->out_color_space = job->channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_start_decompress(image);
    if (image->output_components != job->channels)
        return GAVE_UP;

    JDIMENSION first = job->left > REACH ? job->left - REACH : 0;
    JDIMENSION last = job->left + job->width + REACH;
    if (last > image->output_width)
        last = image->output_width;
    JDIMENSION columns = last - first;
    if (columns < image->output_width)
        jpeg_crop_scanline(image, &first, &columns); /* moves first to where a block begins */
    /* whole rows of blocks from the top: skips that begin or end elsewhere have had faults */
    JDIMENSION block = image->max_v_samp_factor * DCTSIZE;
    JDIMENSION skipped = job->top > REACH ? (job->top - REACH) / block * block : 0;
    if (skipped && jpeg_skip_scanlines(image, skipped) != skipped)
        return GAVE_UP;
    size_t line_size = (size_t)image->output_width * job->channels;
    size_t row_size = (size_t)job->width * job->channels;
    size_t offset = (size_t)(job->left - first) * job->channels;
    if (first > job->left || offset + row_size > line_size)
        return GAVE_UP;

    /* of the image's memory pool, which goes with the image */
    JSAMPROW line = image->mem->alloc_large((j_common_ptr)image, JPOOL_IMAGE, line_size);
    unsigned char *row = job->pixels;
    while (image->output_scanline < job->top + job->height) {
        int wanted = image->output_scanline >= job->top;
        if (jpeg_read_scanlines(image, &line, 1) != 1)
            return GAVE_UP;
        if (wanted) {
            memcpy(row, line + offset, row_size);
            row += row_size;
        }
    }
    return DECODED;
}

static enum outcome decode(job *job)
{
    job->image.err = jpeg_std_error(&job->errors);
    job->image.client_data = job;
    job->errors.error_exit = give_up;
    job->errors.emit_message = give_up_on_warnings;
    job->errors.output_message = say_nothing;
    enum outcome outcome = decode_or_jump(job);
    jpeg_destroy_decompress(&job->image);
    return outcome;
}

/* ---- Python -------------------------------------------------------------------------------- */

static PyObject *py_header(PyObject *self, PyObject *args)
{
    Py_buffer content;
    unsigned width = 0, height = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*:header", &content))
        return NULL;
    span file = {content.buf, (size_t)content.len};
    int suitable = inspect(file, &width, &height);
    PyBuffer_Release(&content);
    if (!suitable)
        Py_RETURN_NONE;
    return Py_BuildValue("(II)", width, height);
}

static PyObject *py_decode_region(PyObject *self, PyObject *args)
{
    Py_buffer content, out;
    int top, left, height, width, channels;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*iiiiiw*:decode_region", &content, &top, &left, &height, &width,
                          &channels, &out))
        return NULL;
    enum outcome outcome = OUT_OF_RANGE;
    const char *fault = "the region lies outside the image";
    if (channels != 1 && channels != 3) {
        fault = "channels must be 1 or 3";
    } else if (top < 0 || left < 0 || height <= 0 || width <= 0 || height > JPEG_MAX_DIMENSION
               || width > JPEG_MAX_DIMENSION) {
        fault = "the region is empty or outside every image";
    } else if ((unsigned long long)height * width * channels != (unsigned long long)out.len) {
        fault = "out must hold height x width x channels bytes";
    } else {
        job job;
        memset(&job, 0, sizeof job);
        job.file = (span){content.buf, (size_t)content.len};
        job.top = (JDIMENSION)top;
        job.left = (JDIMENSION)left;
        job.height = (JDIMENSION)height;
        job.width = (JDIMENSION)width;
        job.channels = channels;
        job.pixels = out.buf;
        Py_BEGIN_ALLOW_THREADS
        outcome = decode(&job);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&content);
    PyBuffer_Release(&out);
    if (outcome == OUT_OF_RANGE) {
        PyErr_SetString(PyExc_ValueError, fault);
        return NULL;
    }
    return PyBool_FromLong(outcome == DECODED);
}

static PyMethodDef methods[] = {
    {"header", py_header, METH_VARARGS,
     "header(content) -> (width, height), or None when the file must be decoded whole."},
    {"decode_region", py_decode_region, METH_VARARGS,
     "decode_region(content, top, left, height, width, channels, out) -> bool\n\n"
     "Writes (height, width, channels) bytes to out. False when the file must be decoded whole."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_region", "Regions of JPEGs.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__region(void)
{
    return PyModuleDef_Init(&module);
}
