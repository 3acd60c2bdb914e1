/*
 * Bring the results of `glovlm slide --objects` into every slide of a project that has some.
 *
 * Run it in QuPath: Automate > Script editor, open this file, Run > Run (not "Run for project").
 * Close the image in the viewer before, and open it again afterwards.
 * An object that is there already, under the same id or with the same outline, is replaced by the
 * one with class and measurements; so nothing is doubled, also when the script runs twice. It also
 * replaces what was corrected meanwhile: export corrections before results are brought in again.
 *
 * Written for the scripting API of QuPath 0.4 to 0.6.
 */
import qupath.lib.io.PathIO
import static qupath.lib.gui.scripting.QPEx.*

// Where from: the output folder of `glovlm slide`.
def results = new File('/path/to/results')

// The name of a slide's file without its suffix; `.ome.tif` is one suffix.
def nameOf = { entry ->
    def path = entry.getURIs().iterator().next().getPath()
    return new File(path).getName().replaceFirst(/\.[^.]+$/, '').replaceFirst(/(?i)\.ome$/, '')
}

// Whether two outlines are the same: their boxes agree to a pixel, and their areas to a hundredth.
def isSame = { one, other ->
    if (one == null || other == null) {
        return false
    }
    def box = { [it.getBoundsX(), it.getBoundsY(), it.getBoundsWidth(), it.getBoundsHeight()] }
    def near = [box(one), box(other)].transpose().every { a, b -> Math.abs(a - b) <= 1 }
    return near && Math.abs(one.getArea() - other.getArea()) <= 0.01 * one.getArea()
}

for (entry in getProject().getImageList()) {
    def name = nameOf(entry)
    def file = new File(results, "slides/${name}/objects.geojson")
    if (!file.exists()) {
        print "${name}: no results"
        continue
    }
    def objects = PathIO.readObjects(file)
    def ids = objects.collect { it.getID() } as Set
    def imageData = entry.readImageData()
    def hierarchy = imageData.getHierarchy()
    def before = hierarchy.getAllObjects(false).findAll { there ->
        ids.contains(there.getID()) || objects.any { isSame(it.getROI(), there.getROI()) }
    }
    hierarchy.removeObjects(before, true)
    hierarchy.addObjects(objects)
    entry.saveImageData(imageData)
    print "${name}: ${objects.size()} objects, of which ${before.size()} were there"
}
getProject().syncChanges()
