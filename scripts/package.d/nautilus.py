"""Copy link, Upload status and Keep on this computer in the context menu of Nautilus, for files on a mount of packmule.

Nautilus loads it where python3-nautilus is installed.
"""

import os
import subprocess

from gi.repository import GObject, Nautilus

HELPER = "/usr/libexec/packmule/file-action"
ACTIONS = [
    ("link", "Copy link", "Copies links to these files, which anybody may fetch for seven days"),
    ("status", "Upload status", "Says whether this is stored in S3, and what is still under way"),
    ("pin", "Keep on this computer", "Fetches this now and keeps it, to be read without the network too"),
]


def mountpoints():
    """Where packmule is mounted. The kernel writes blanks in names as \\040."""
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split(b" ")
            after = fields[fields.index(b"-") + 1 :]
            if after[0] == b"fuse.packmule":
                found.append(fields[4].decode("unicode_escape").encode("latin-1"))
    return found


def is_there(path, points):
    """True for what lies on a mount of packmule; asks the filesystem nothing."""
    path = os.fsencode(path)
    return any(path == point or path.startswith(point.rstrip(b"/") + b"/") for point in points)


class PackmuleMenu(GObject.GObject, Nautilus.MenuProvider):
    """The menu."""

    def get_file_items(self, *arguments):
        """Nautilus before 43 gives its window first."""
        files = arguments[-1]
        paths = [file.get_location().get_path() for file in files]
        points = mountpoints()
        if not paths or not points or not all(path and is_there(path, points) for path in paths):
            return []
        folders = any(file.is_directory() for file in files)
        items = []
        for action, label, tip in ACTIONS:
            if action == "link" and folders:
                continue
            item = Nautilus.MenuItem(name=f"Packmule::{action}", label=label, tip=tip)
            item.connect("activate", self.run, action, paths)
            items.append(item)
        return items

    def run(self, _item, action, paths):
        """No shell reads the names."""
        subprocess.Popen([HELPER, action, *paths], start_new_session=True)
