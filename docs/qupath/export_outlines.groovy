/*
 * Export the outlines of every slide of a project: one GeoJSON file a slide, called as the slide is.
 *
 * Run it in QuPath: Automate > Script editor, open this file, Run > Run (not "Run for project").
 * Save your changes before; what is not saved is not exported. A file of the same name is replaced.
 * Detections are left out, but for those that `import_results.groovy` brought in.
 *
 * Written for the scripting API of QuPath 0.4 to 0.6.
 */
import qupath.lib.io.PathIO
import static qupath.lib.gui.scripting.QPEx.*

// Where to: a folder of the project. Give another name after a correction, such as 'corrected'.
def target = new File(buildFilePath(PROJECT_BASE_DIR, 'outlines'))

// The name of a slide's file without its suffix; `.ome.tif` is one suffix.
def nameOf = { entry ->
    def path = entry.getURIs().iterator().next().getPath()
    return new File(path).getName().replaceFirst(/\.[^.]+$/, '').replaceFirst(/(?i)\.ome$/, '')
}

target.mkdirs()
def entries = getProject().getImageList()
def twice = entries.groupBy(nameOf).findAll { name, those -> those.size() > 1 }.keySet()
if (!twice.isEmpty()) {
    print "Several images of the project are called ${twice.join(', ')}: remove all but one of each."
    return
}

for (entry in entries) {
    def name = nameOf(entry)
    def objects = entry.readHierarchy().getAllObjects(false).findAll {
        it.isAnnotation() || it.getMeasurements().containsKey('doubt')
    }
    if (objects.isEmpty()) {
        print "${name}: no outlines, so no file"
        continue
    }
    def file = new File(target, name + '.geojson')
    PathIO.exportObjectsAsGeoJSON(file, objects, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    print "${name}: ${objects.size()} outlines"
}
print "The files are in ${target}"
