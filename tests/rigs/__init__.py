"""What tests share: processes, members without sockets, faulty disks, models."""
