/* The threads that wait for the next parallel region. */
#include <omp.h>

/* Those of the calling thread end; its next region with a team starts new ones, which takes some 50 us. Returns 0, or another number
 * where nothing was done, as inside a region.
 *
 * A thread that has nothing to do looks for work for milliseconds before it sleeps, on a core that somebody else may have got. */
int disband(void) { return omp_pause_resource_all(omp_pause_soft); }
